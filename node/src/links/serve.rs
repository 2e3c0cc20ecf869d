//! A router's side: accepts links, and serves the api with the same transport settings.

use std::pin::Pin;

use im_proto::{
    environment::Environment,
    link::channel::{PeerEnd, RouterEnd},
    v1::{
        GatewayLinkItem, PeerBatch, PeerLinkItem, RouterBatch,
        link_service_server::{LinkService, LinkServiceServer},
    },
};
use im_registry::Role;
use im_router::Router;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::{
    Request, Response, Status, Streaming,
    service::Routes,
    transport::{Error, Server, server::TcpIncoming},
};

use super::{
    FRAME_BYTES_MAX, ITEM_BYTES_MAX, KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT, STREAMS_MAX, WINDOW_BYTES,
    pump::{self, Answering},
    tls::{self, ServiceTls},
};

/// Takes the router's ends of links.
pub trait AcceptLinks: Send + Sync + 'static {
    fn gateway(&self, end: RouterEnd);
    fn peer(&self, end: PeerEnd);
}

impl AcceptLinks for Router {
    fn gateway(&self, end: RouterEnd) {
        self.accept_gateway(end);
    }

    fn peer(&self, end: PeerEnd) {
        self.accept_peer(end);
    }
}

struct Links<A> {
    acceptor: A,
    environment: Environment,
    /// Peers prove their role; without service certificates they cannot.
    prove: bool,
}

impl<A> Links<A> {
    fn admit<T>(&self, request: &Request<T>, role: Role) -> Result<(), Status> {
        let certificates = request.peer_certs();
        let leaf = certificates.as_ref().and_then(|chain| chain.first());
        if !self.prove || leaf.is_some_and(|leaf| tls::is_of_role(leaf, role)) {
            return Ok(());
        }
        let name = tls::name_of(role);
        tracing::warn!(peer = ?request.remote_addr(), name, "a link was refused: the certificate is not for this role");
        Err(Status::permission_denied(format!("this link is for certificates with the DNS name {name}")))
    }
}

#[tonic::async_trait]
impl<A: AcceptLinks> LinkService for Links<A> {
    type GatewayStream = Answering<RouterBatch>;
    type PeerStream = Answering<PeerBatch>;

    async fn gateway(
        &self,
        request: Request<Streaming<GatewayLinkItem>>,
    ) -> Result<Response<Self::GatewayStream>, Status> {
        self.admit(&request, Role::Gateway)?;
        let (sender, outgoing) = pump::away();
        self.acceptor.gateway(pump::end(sender, request.into_inner(), &self.environment));
        Ok(Response::new(Answering(outgoing)))
    }

    async fn peer(&self, request: Request<Streaming<PeerLinkItem>>) -> Result<Response<Self::PeerStream>, Status> {
        self.admit(&request, Role::Router)?;
        let (sender, outgoing) = pump::away();
        self.acceptor.peer(pump::end(sender, request.into_inner(), &self.environment));
        Ok(Response::new(Answering(outgoing)))
    }
}

/// The name under which health checks ask for links.
pub const LINK_SERVICE: &str = im_proto::v1::link_service_server::SERVICE_NAME;

/// Accepts links until cancelled, beside what `routes` has: health and reflection.
pub fn serve_links(
    listener: TcpListener,
    routes: Routes,
    acceptor: impl AcceptLinks,
    tls: Option<&ServiceTls>,
    environment: &Environment,
    cancel: CancellationToken,
) -> Result<Serving, Error> {
    let links = Links { acceptor, environment: environment.clone(), prove: tls.is_some() };
    let service = LinkServiceServer::new(links).max_decoding_message_size(ITEM_BYTES_MAX);
    serve(listener, routes.add_service(service), STREAMS_MAX, tls, cancel)
}

/// Serves the api until cancelled.
pub fn serve_api(
    listener: TcpListener,
    routes: Routes,
    tls: Option<&ServiceTls>,
    cancel: CancellationToken,
) -> Result<Serving, Error> {
    serve(listener, routes, API_STREAMS_MAX, tls, cancel)
}

/// Calls of one connection of another service at a time; each holds a request of at most 1 MiB.
const API_STREAMS_MAX: u32 = 1024;

/// A server that runs while it is polled.
pub type Serving = Pin<Box<dyn Future<Output = Result<(), Error>> + Send>>;

fn serve(
    listener: TcpListener,
    routes: Routes,
    streams_max: u32,
    tls: Option<&ServiceTls>,
    cancel: CancellationToken,
) -> Result<Serving, Error> {
    let mut server = Server::builder()
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES_MAX)
        .max_concurrent_streams(streams_max)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT));
    if let Some(tls) = tls {
        server = server.tls_config(tls.listening())?;
    }
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let serving = server.add_routes(routes).serve_with_incoming_shutdown(incoming, cancel.cancelled_owned());
    Ok(Box::pin(serving))
}
