//! What operators and orchestrators ask over plain HTTP: `/metrics`, `/healthz`, `/readyz`. Nothing of users is served here.

use std::{io, sync::Arc};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
};
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::{net::TcpListener, sync::watch};
use tokio_util::sync::CancellationToken;

/// Whether the process wants traffic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Readiness {
    Starting,
    Ready,
    Draining,
}

#[derive(Clone)]
struct Http {
    metrics: PrometheusHandle,
    readiness: watch::Receiver<Readiness>,
}

/// Serves until cancelled.
pub async fn serve(
    listener: TcpListener,
    metrics: PrometheusHandle,
    readiness: watch::Receiver<Readiness>,
    cancel: CancellationToken,
) -> io::Result<()> {
    let state = Arc::new(Http { metrics, readiness });
    let routes = Router::new()
        .route("/metrics", get(render_metrics))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .with_state(state);
    axum::serve(listener, routes).with_graceful_shutdown(cancel.cancelled_owned()).await
}

async fn render_metrics(State(http): State<Arc<Http>>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], http.metrics.render())
}

async fn ready(State(http): State<Arc<Http>>) -> impl IntoResponse {
    match &*http.readiness.borrow() {
        Readiness::Ready => (StatusCode::OK, "ready\n"),
        Readiness::Starting => (StatusCode::SERVICE_UNAVAILABLE, "starting\n"),
        Readiness::Draining => (StatusCode::SERVICE_UNAVAILABLE, "draining\n"),
    }
}
