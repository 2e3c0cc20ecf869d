//! Plain TCP, for loopback and for networks that are protected otherwise.

use std::{io, net::SocketAddr, time::Duration};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::{net::TcpStream, time::sleep};

use crate::{Gateway, ListenError, PeerInfo, Transport};

/// Connections that wait to be accepted; a storm of reconnects fills it.
const BACKLOG: i32 = 4096;
/// Out of descriptors or memory: trying again at once would only burn the core.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Connections that are accepted before everybody else has a turn: a burst of them is work for milliseconds.
const ACCEPTED_AT_ONCE: usize = 8;

/// A bound listener.
pub struct Listener {
    socket: tokio::net::TcpListener,
    address: SocketAddr,
}

/// Binds an address; port 0 takes any free one.
pub fn bind(address: SocketAddr) -> Result<Listener, ListenError> {
    let failed = |source| ListenError::Bind { address, source };
    let socket = listen(address).map_err(failed)?;
    let address = socket.local_addr().map_err(failed)?;
    Ok(Listener { socket, address })
}

fn listen(address: SocketAddr) -> io::Result<tokio::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    // A restart must not wait for connections of the old process.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    tokio::net::TcpListener::from_std(socket.into())
}

impl Listener {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Accepts until the gateway drains or stops. Connections go on as tasks of the environment.
    pub async fn run(self, gateway: Gateway) {
        let accepting = self.accept_each(&gateway, |stream, remote_address| {
            let peer = PeerInfo { transport: Transport::Tcp, remote_address };
            gateway.shared.environment.spawn(gateway.serve_stream(stream, peer));
        });
        until_drain(&gateway, accepting).await;
    }

    /// Hands over each accepted stream.
    pub(super) async fn accept_each(&self, gateway: &Gateway, mut serve: impl FnMut(TcpStream, SocketAddr)) {
        let (effort, metrics) = (&gateway.shared.limits.effort, &gateway.shared.metrics);
        for accepted in 1_usize.. {
            // Who has to wait waits in the kernel, where it costs nothing.
            if effort.is_exhausted() {
                metrics.accept_waits.increment(1);
            }
            effort.accept().await;
            match self.socket.accept().await {
                Ok((stream, remote_address)) => match stream.set_nodelay(true) {
                    Ok(()) => serve(stream, remote_address),
                    Err(error) => tracing::debug!(%error, "the connection ended before it was served"),
                },
                Err(error) => {
                    gateway.shared.metrics.transport_failures.increment(1);
                    if !is_of_one_connection(&error) {
                        tracing::warn!(%error, "cannot accept");
                        sleep(ACCEPT_PAUSE).await;
                    }
                }
            }
            if accepted.is_multiple_of(ACCEPTED_AT_ONCE) {
                tokio::task::yield_now().await;
            }
        }
    }
}

fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionRefused
    )
}

/// Runs a listener's loop until the gateway drains or stops.
pub(super) async fn until_drain(gateway: &Gateway, accepting: impl Future<Output = ()>) {
    let mut drain = gateway.shared.admission.drain();
    tokio::select! {
        biased;
        _ = drain.wait_for(|drain| *drain) => {}
        () = gateway.shared.stop.cancelled() => {}
        () = accepting => {}
    }
}
