//! TCP in the clear.

use tokio::net::TcpStream;

use super::DialError;

pub(super) async fn dial(address: &str) -> Result<TcpStream, DialError> {
    let stream = TcpStream::connect(address).await?;
    // Frames are written in batches already; waiting for more would only add delay.
    stream.set_nodelay(true)?;
    Ok(stream)
}
