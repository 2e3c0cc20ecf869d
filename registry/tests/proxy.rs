//! A TCP proxy that can be cut: the network between one process and etcd.

use std::sync::Arc;

use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::watch,
};

/// What the proxy does with connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    Open,
    /// Connections end, new ones are closed at once.
    Cut,
    /// Connections stay and carry nothing; new ones are accepted and carry nothing.
    Silent,
}

pub struct Proxy {
    pub url: String,
    way: watch::Sender<Way>,
}

impl Proxy {
    /// Listens on a free port and forwards to `target` (`host:port`).
    pub async fn start(target: &str) -> Arc<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let way = watch::Sender::new(Way::Open);
        let (target, ways) = (target.to_owned(), way.subscribe());
        tokio::spawn(async move {
            loop {
                let Ok((client, _)) = listener.accept().await else { return };
                tokio::spawn(forward(client, target.clone(), ways.clone()));
            }
        });
        Arc::new(Self { url, way })
    }

    pub fn set(&self, way: Way) {
        self.way.send_replace(way);
    }
}

async fn forward(mut client: TcpStream, target: String, mut way: watch::Receiver<Way>) {
    let carried = async {
        let Ok(mut server) = TcpStream::connect(&target).await else { return };
        let _ = copy_bidirectional(&mut client, &mut server).await;
    };
    tokio::pin!(carried);
    loop {
        let now = *way.borrow_and_update();
        tokio::select! {
            biased;
            changed = way.changed() => if changed.is_err() { return },
            () = &mut carried, if now == Way::Open => return,
            () = async {}, if now == Way::Cut => return,
        }
    }
}
