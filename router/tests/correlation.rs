//! What a client is told of a failure of the server, and what the log has of it, are found by the same id.

use std::{
    io,
    sync::{Arc, Mutex},
};

use im_proto::{StatusCode, method::Method, v1};
use im_storage::{Directory as _, Memory, StateWrite, Store, Table};

use crate::support::{CLUSTER, World, message, to, user};

/// What was logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Log {
    fn lines_with(&self, text: &str) -> Vec<String> {
        let log = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        log.lines().filter(|line| line.contains(text)).map(str::to_owned).collect()
    }
}

#[tokio::test(start_paused = true)]
async fn a_failed_open_is_found_in_the_log_by_the_id_that_its_callers_got() {
    let log = Log::default();
    let writer = log.clone();
    let logging = tracing_subscriber::fmt().with_writer(move || writer.clone()).with_ansi(false).finish();
    // With a second one alive, a place that another test's thread comes by first is not taken to be of interest to nobody.
    let _other = tracing::Dispatch::new(tracing_subscriber::fmt().with_writer(io::sink).finish());
    let _logging = tracing::subscriber::set_default(logging);

    let store = Store::from(Memory::new());
    let world = World::new(store.clone());
    let direct = |peer: &str| CLUSTER.direct_id(&user("alice"), &user(peer));
    for peer in ["bob", "carl"] {
        // Bytes that are no head row.
        let head = StateWrite {
            table: Table::Heads,
            partition: direct(peer).to_bytes(),
            key: bytes::Bytes::new(),
            value: Some(bytes::Bytes::from_static(&[0xff])),
            timestamp: 5,
        };
        store.write(vec![head]).await.unwrap();
    }
    let router = world.router(world.config("r1")).await;
    let mut gateway = world.gateway("g1", &router).await;
    gateway.open(&world, 1, "alice", "a1").await;

    gateway.send(1, direct("bob"), message("bob", "m1", "m1", "", 0)).await;
    let of_send = gateway.ack("m1").await.status.expect("a refusal");
    let read = v1::HistoryRequest { target: to(direct("carl")), from: 1, ..v1::HistoryRequest::default() };
    let of_call = gateway.call::<v1::HistoryReply>(1, Method::MessageHistory, &read).await.expect_err("a refusal");
    assert_ne!(of_send.correlation_id, of_call.correlation_id);
    for (status, conversation) in [(of_send, direct("bob")), (of_call, direct("carl"))] {
        assert_eq!(status.code, StatusCode::Unavailable.number(), "it may be tried again");
        assert_eq!(status.correlation_id.len(), 16, "{status:?}");
        let lines = log.lines_with(&format!("correlation_id={}", status.correlation_id));
        let [line] = &lines[..] else { panic!("{} is logged once: {lines:?}", status.correlation_id) };
        assert!(line.contains(" ERROR ") && line.contains(&conversation.to_string()), "{line}");
    }
    let read = v1::HistoryRequest { target: to(direct("dora")), from: 1, ..v1::HistoryRequest::default() };
    let refused = gateway.call::<v1::HistoryReply>(1, Method::MessageHistory, &read).await.expect_err("a refusal");
    assert_eq!(refused.correlation_id, "", "what is no failure of the server names nothing: {refused:?}");
}
