//! The gateway as its process sees it: start it, give it streams, drain it.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use im_proto::{
    BootId, InstanceId, ShardCount, StatusCode,
    environment::Environment,
    key::ClusterSecret,
    link::channel::{Connector, GatewayEnd},
    status::CorrelationId,
    v1::{self, GatewayLoad},
};
use im_registry::View;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::watch,
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use crate::{
    addresses::{AddressPlace, Excess},
    admission::Admission,
    config::GatewayConfig,
    connection::{Connection, Transport, outbox::Bounds},
    drain,
    limits::Limits,
    metrics::Metrics,
    neighbours::{AddressRate, Neighbours},
    routing::{self, Routing},
    sessions::Sessions,
};

/// A running gateway; clones are the same one. Its tasks belong to the environment and end with [`Gateway::stop`].
#[derive(Clone)]
pub struct Gateway {
    pub(crate) shared: Arc<Shared>,
}

/// What all tasks of a gateway share.
pub(crate) struct Shared {
    pub config: GatewayConfig,
    pub bounds: Bounds,
    pub environment: Environment,
    pub instance: InstanceId,
    pub boot: BootId,
    pub secret: ClusterSecret,
    pub shards: ShardCount,
    pub connector: Arc<dyn Connector<GatewayEnd>>,
    pub sessions: Sessions,
    pub routing: Routing,
    pub neighbours: Neighbours,
    pub locates: AddressRate,
    pub limits: Limits,
    pub admission: Admission,
    pub metrics: Metrics,
    pub stop: CancellationToken,
}

/// Who is at the other end of a stream.
#[derive(Clone, Copy, Debug)]
pub struct PeerInfo {
    pub transport: Transport,
    pub remote_address: SocketAddr,
}

impl Shared {
    pub fn load(&self) -> GatewayLoad {
        let wide = |count: usize| u64::try_from(count).unwrap_or(u64::MAX);
        GatewayLoad {
            connections: wide(self.admission.connections()),
            capacity: wide(self.admission.capacity()),
            draining: self.admission.is_draining(),
        }
    }

    /// The status of what must not happen; the log has it under the same id.
    pub fn mistake(&self, what: &str) -> v1::Status {
        let correlation_id = CorrelationId::draw(&*self.environment.random);
        tracing::error!(%correlation_id, what, "a mistake of the server");
        correlation_id.of(StatusCode::Internal.to_status())
    }
}

impl Gateway {
    /// Starts following the registry and dialling routers. `connector` makes links to the `link` endpoints in the view.
    #[expect(clippy::too_many_arguments, reason = "each is a different part of the surroundings, named once at start")]
    pub fn start(
        config: GatewayConfig,
        environment: Environment,
        instance: InstanceId,
        boot: BootId,
        secret: ClusterSecret,
        shards: ShardCount,
        view: watch::Receiver<Arc<View>>,
        connector: Arc<dyn Connector<GatewayEnd>>,
    ) -> Gateway {
        let shared = Arc::new(Shared {
            bounds: Bounds {
                bytes_max: config.outbox_bytes_max,
                reply_bytes_max: config.reply_bytes_max,
                resync_spread_ms: u32::try_from(config.resync_spread_one.as_millis()).unwrap_or(u32::MAX),
            },
            admission: Admission::new(config.connections_max, config.handshakes_max),
            neighbours: Neighbours::default(),
            limits: Limits::new(&environment, &config),
            locates: AddressRate::new(&environment, config.locates_per_second_max),
            environment,
            instance,
            boot,
            secret,
            shards,
            connector,
            sessions: Sessions::new(),
            routing: Routing::default(),
            metrics: Metrics::new(),
            stop: CancellationToken::new(),
            config,
        });
        shared.environment.spawn(routing::follow(shared.clone(), view));
        Gateway { shared }
    }

    /// Runs one connection to its end. The future is the connection: dropping it drops the connection.
    pub fn serve_stream<S>(&self, stream: S, peer: PeerInfo) -> impl Future<Output = ()> + Send + 'static
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let address = self.arrive(peer.remote_address);
        Connection::accept(self.shared.clone(), stream, peer, address)
    }

    /// The same for a stream whose address was judged before its transport's handshake.
    pub(crate) fn serve_judged<S>(
        &self,
        stream: S,
        peer: PeerInfo,
        address: Option<AddressPlace>,
    ) -> impl Future<Output = ()> + Send + 'static
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        Connection::accept(self.shared.clone(), stream, peer, Ok(address))
    }

    /// Whether an address may connect once more.
    pub(crate) fn arrive(&self, address: SocketAddr) -> Result<Option<AddressPlace>, Excess> {
        let limits = &self.shared.limits;
        limits.addresses.arrive(address.ip(), limits.time(Instant::now()))
    }

    /// Whether links lead to the owners of all shards.
    pub fn is_routed(&self) -> bool {
        let routes = self.shared.routing.routes();
        self.shared.shards.shards().all(|shard| routes.owner(shard).is_some_and(|link| link.is_up()))
    }

    /// How full it is.
    pub fn load(&self) -> GatewayLoad {
        self.shared.load()
    }

    /// Takes nothing new, tells each client within the window to go elsewhere, closes each connection once what it sent was
    /// answered (at the latest after the grace of the configuration), and returns when all are gone.
    pub async fn drain(&self, window: Duration) {
        drain::run(&self.shared, window).await;
    }

    /// Ends links and the following of the registry. Connections that are left lose their links.
    pub fn stop(&self) {
        self.shared.stop.cancel();
    }
}
