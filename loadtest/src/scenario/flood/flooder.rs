//! The process that floods.

use std::{
    io::{Read as _, Write as _},
    net::SocketAddr,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use tokio::{io::AsyncReadExt as _, time::Instant};

use super::{Attempts, Flood, careless, decoy::Decoy};
use crate::stream::{Connector, Transport};

/// Attempts under way at once.
const AT_ONCE: usize = 256;
const FLOOD_FROM: std::net::IpAddr = std::net::IpAddr::V4(std::net::Ipv4Addr::new(127, 0, 0, 2));
const ATTEMPT_WITHIN: Duration = Duration::from_secs(5);
const GARBAGE_BYTES: usize = 4096;
const DATAGRAM_BYTES: usize = 1200;
/// The type of a record that an answer to a hello begins with (RFC 8446, 5.1); an alert has another.
const TLS_HANDSHAKE: u8 = 22;

/// Whatever the flooder itself needs is not taken from those whom it disturbs: it runs when nobody else wants to. Where the scheduler's
/// class for that cannot be had (it is set by util-linux' `chrt`) it has the lowest priority, and may then keep a core for a slice.
/// Whether it could.
fn yield_to_everybody() -> bool {
    let own = std::process::id().to_string();
    let idle = std::process::Command::new("chrt").args(["--all-tasks", "--idle", "--pid", "0", &own]).output();
    let yielded = idle.is_ok_and(|output| output.status.success());
    if !yielded {
        let _ = rustix::process::nice(19);
    }
    yielded
}

/// Floods until standard input ends.
pub fn attack(kind: Flood, address: &str, udp: Option<&str>, rate: f64, admitted: f64) -> anyhow::Result<()> {
    let (ended, mut over) = tokio::sync::watch::channel(false);
    std::thread::spawn(move || {
        let _ = std::io::stdin().lock().read_to_end(&mut Vec::new());
        let _ = ended.send(true);
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let counts = Counts::default();
    let yielded = runtime.block_on(async {
        let decoy = match kind {
            Flood::Elsewhere => Some(Decoy::listen(FLOOD_FROM, admitted).await?),
            Flood::Connects | Flood::Hellos | Flood::Handshakes | Flood::Garbage => None,
        };
        let address = decoy.as_ref().map_or(address, |decoy| decoy.address.as_str());
        let serves = async {
            match &decoy {
                Some(decoy) => decoy.run().await,
                None => std::future::pending().await,
            }
        };
        let attack = Attack::new(kind, address, udp, rate).await?;
        let attacks = async {
            // Before it yields: on a machine that has nothing to spare there may be no other attempt.
            attack.count(&counts, &mut 1).await;
            let yielded = yield_to_everybody();
            std::io::stdout().write_all(b"\n")?;
            std::io::stdout().flush()?;
            tokio::select! {
                biased;
                _ = over.changed() => anyhow::Ok(yielded),
                _ = attack.run(&counts) => anyhow::bail!("no lane ever ends by itself"),
            }
        };
        tokio::select! {
            yielded = attacks => yielded,
            never = serves => match never {},
        }
    })?;
    let [done, failed] = [&counts.done, &counts.failed].map(|count| count.load(Ordering::Relaxed));
    println!("{}", serde_json::to_string(&Attempts { done, failed, yielded })?);
    Ok(())
}

#[derive(Default)]
struct Counts {
    done: AtomicU64,
    failed: AtomicU64,
}

struct Attack<'a> {
    kind: Flood,
    address: &'a str,
    udp: Option<SocketAddr>,
    rate: f64,
    connector: Connector,
    /// Of a handshake.
    hello: Vec<u8>,
    datagrams: tokio::net::UdpSocket,
}

impl<'a> Attack<'a> {
    async fn new(kind: Flood, address: &'a str, udp: Option<&str>, rate: f64) -> anyhow::Result<Self> {
        let mut connector = match kind {
            Flood::Elsewhere | Flood::Handshakes => Connector::with_tls(careless::config()?),
            Flood::Connects | Flood::Hellos | Flood::Garbage => Connector::new(Transport::Tcp, None)?,
        };
        let hello = match kind {
            Flood::Hellos => Connector::with_tls(careless::config()?).client_hello(address)?,
            Flood::Connects | Flood::Elsewhere | Flood::Handshakes | Flood::Garbage => Vec::new(),
        };
        if address.starts_with("127.") {
            // Another address than the established users have: limits of addresses must tell them apart.
            connector.come_from(FLOOD_FROM);
        }
        let datagrams = tokio::net::UdpSocket::bind("0.0.0.0:0").await?;
        Ok(Self { kind, address, udp: udp.map(str::parse).transpose()?, rate, connector, hello, datagrams })
    }

    /// At most [`AT_ONCE`] attempts at once, each lane at its share of the rate.
    async fn run(&self, counts: &Counts) -> Vec<std::convert::Infallible> {
        let every = Duration::from_secs_f64(AT_ONCE as f64 / self.rate.max(0.1));
        let lanes = (0..AT_ONCE).map(|lane| async move {
            let mut next = Instant::now() + every * u32::try_from(lane).unwrap_or(0) / AT_ONCE as u32;
            let mut noise = lane as u64 + 1;
            loop {
                tokio::time::sleep_until(next).await;
                // Behind the schedule it does not catch up: a slow server is flooded by those at once.
                next = (next + every).max(Instant::now());
                self.count(counts, &mut noise).await;
            }
        });
        futures::future::join_all(lanes).await
    }

    async fn count(&self, counts: &Counts, noise: &mut u64) {
        match tokio::time::timeout(ATTEMPT_WITHIN, self.attempt(noise)).await {
            Ok(Ok(())) => counts.done.fetch_add(1, Ordering::Relaxed),
            Ok(Err(_)) | Err(_) => counts.failed.fetch_add(1, Ordering::Relaxed),
        };
    }

    async fn attempt(&self, noise: &mut u64) -> anyhow::Result<()> {
        let mut stream = self.connector.connect(self.address).await?;
        match self.kind {
            Flood::Connects | Flood::Elsewhere | Flood::Handshakes => return Ok(()),
            Flood::Hellos => {
                tokio::io::AsyncWriteExt::write_all(&mut stream, &self.hello).await?;
                let record = stream.read_u8().await?;
                anyhow::ensure!(record == TLS_HANDSHAKE, "the server sent no answer but a record of type {record}");
                return Ok(());
            }
            Flood::Garbage => {}
        }
        if let Some(udp) = self.udp {
            self.datagrams.send_to(&garbage(noise, DATAGRAM_BYTES), udp).await?;
        }
        tokio::io::AsyncWriteExt::write_all(&mut stream, &garbage(noise, GARBAGE_BYTES)).await?;
        // Until the server has had enough of it.
        let _ = stream.read_u8().await;
        Ok(())
    }
}

/// Bytes by chance; the same in every run.
fn garbage(noise: &mut u64, bytes: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes + 8);
    while out.len() < bytes {
        *noise ^= *noise << 13;
        *noise ^= *noise >> 7;
        *noise ^= *noise << 17;
        out.extend_from_slice(&noise.to_le_bytes());
    }
    out.truncate(bytes);
    out
}
