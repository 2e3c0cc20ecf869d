//! TLS 1.3 over TCP.

use rustls::pki_types::ServerName;
use tokio_rustls::TlsConnector;

use super::{DialError, Stream, tcp};
use crate::config::Endpoint;

pub(super) async fn dial(connector: &TlsConnector, endpoint: &Endpoint) -> Result<Stream, DialError> {
    let name = ServerName::try_from(endpoint.server_name().to_owned())
        .map_err(|error| DialError(format!("{:?} is no server name: {error}", endpoint.server_name())))?;
    let stream = tcp::dial(&endpoint.address).await?;
    Ok(Box::new(connector.connect(name, stream).await?))
}
