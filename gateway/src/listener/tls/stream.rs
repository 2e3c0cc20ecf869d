//! The server's side of TLS over any stream, without buffers at rest.
//!
//! `rustls` with its own buffers keeps 4 KiB to read into for each connection, forever. Here the bytes of a read lie in a buffer of the
//! thread, records are opened there, and the stream keeps only what is not whole: a part of a record or of a message of the handshake
//! that has not come yet (bounded by [`PARTIAL_BYTES_MAX`]), plain bytes that the reader had no room for (by one read), sealed bytes that
//! the socket did not take (by one write). Each is given back when it is empty.

use std::{
    cell::RefCell,
    future::poll_fn,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use rustls::{
    CommonState, ServerConfig,
    server::UnbufferedServerConnection,
    unbuffered::{ConnectionState, EncodeError, EncryptError, UnbufferedStatus},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Sealed bytes of one read: one whole record at least.
const READ_BYTES: usize = 32 * 1024;
/// Of records that cannot be opened yet, or hold a part of a message of the handshake: these must stay where they are until the message is
/// whole, and a peer may cut it into as many records as it likes. As much as rustls keeps in buffers of its own.
const PARTIAL_BYTES_MAX: usize = 64 * 1024;
/// Plain bytes of one write.
const WRITE_BYTES: usize = 32 * 1024;
/// What sealing adds at most to a write: a header, a content type and a tag for each record of 16 KiB, and a change of keys.
const SEAL_BYTES: usize = 1024;

thread_local! {
    static SEALED_IN: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ_BYTES].into_boxed_slice());
    static SEALED_OUT: RefCell<Box<[u8]>> = RefCell::new(vec![0; WRITE_BYTES + SEAL_BYTES].into_boxed_slice());
}

/// A stream of which the handshake is done.
pub struct TlsStream<S> {
    stream: S,
    session: Session,
}

/// What does not depend on the stream below.
struct Session {
    tls: Box<UnbufferedServerConnection>,
    /// The beginning of a record.
    partial: Vec<u8>,
    /// Opened, and not yet read.
    plain: Pending,
    /// Sealed, and not yet written.
    sealed: Pending,
    /// The peer said that nothing more comes.
    is_ended: bool,
    /// We said so.
    is_closed: bool,
    /// The peer did what TLS forbids: what was opened before may be read, then nothing any more.
    failure: Option<rustls::Error>,
}

/// Bytes that wait, taken from the front. Nothing is kept when they are gone.
#[derive(Default)]
struct Pending {
    bytes: Vec<u8>,
    taken: usize,
}

impl Pending {
    fn waiting(&self) -> &[u8] {
        &self.bytes[self.taken..]
    }

    fn is_empty(&self) -> bool {
        self.waiting().is_empty()
    }

    fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    fn take(&mut self, count: usize) {
        self.taken += count;
        if self.is_empty() {
            *self = Self::default();
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> TlsStream<S> {
    /// Carries out the handshake. What the peer did wrong is `InvalidData`, and the peer is told by an alert if it still listens.
    pub async fn accept(config: Arc<ServerConfig>, stream: S) -> io::Result<Self> {
        let tls = UnbufferedServerConnection::new(config).map_err(io::Error::other)?;
        let session = Session {
            tls: Box::new(tls),
            partial: Vec::new(),
            plain: Pending::default(),
            sealed: Pending::default(),
            is_ended: false,
            is_closed: false,
            failure: None,
        };
        let mut accepted = Self { stream, session };
        while accepted.session.tls.is_handshaking() {
            let outcome = poll_fn(|cx| accepted.poll_more(cx, &mut ReadBuf::new(&mut []))).await;
            if accepted.session.tls.is_handshaking() {
                // The peer waits for it, or is told by it what went wrong.
                let flushed = poll_fn(|cx| accepted.poll_sealed(cx)).await;
                accepted.session.check()?;
                flushed?;
            }
            if outcome? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        // The ticket: a client may well read it only when it reads something else.
        match poll_fn(|cx| Poll::Ready(accepted.poll_sealed(cx))).await {
            Poll::Ready(Err(error)) => return Err(error),
            Poll::Ready(Ok(())) | Poll::Pending => {}
        }
        Ok(accepted)
    }

    /// What was agreed upon in the handshake.
    pub fn agreed(&self) -> &CommonState {
        &self.session.tls
    }

    /// Reads once and opens what came, into `plain` as far as there is room. Returns the sealed bytes read, 0 at the end of the stream.
    fn poll_more(&mut self, cx: &mut Context<'_>, plain: &mut ReadBuf<'_>) -> Poll<io::Result<usize>> {
        let Self { stream, session } = self;
        SEALED_IN.with_borrow_mut(|buffer| {
            let mut read = ReadBuf::new(buffer);
            ready!(Pin::new(stream).poll_read(cx, &mut read))?;
            let sealed = read.filled_mut();
            let count = sealed.len();
            session.open(sealed, plain)?;
            Poll::Ready(Ok(count))
        })
    }

    /// Writes what is sealed.
    fn poll_sealed(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let sealed = &mut self.session.sealed;
        while !sealed.is_empty() {
            let count = ready!(Pin::new(&mut self.stream).poll_write(cx, sealed.waiting()))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            sealed.take(count);
        }
        Poll::Ready(Ok(()))
    }
}

impl Session {
    /// Opens the records in what was read; keeps the rest for the next read.
    fn open(&mut self, sealed: &mut [u8], plain: &mut ReadBuf<'_>) -> io::Result<()> {
        if self.partial.is_empty() {
            let done = self.process(sealed, plain)?;
            self.keep(sealed[done..].to_vec());
            return Ok(());
        }
        self.partial.extend_from_slice(sealed);
        self.go_on(plain)
    }

    /// Does what can be done with what is kept.
    fn go_on(&mut self, plain: &mut ReadBuf<'_>) -> io::Result<()> {
        let mut joined = std::mem::take(&mut self.partial);
        let done = self.process(&mut joined, plain)?;
        // Not the large buffer of records that are opened for the sake of the beginning of the next.
        self.keep(if done == 0 { joined } else { joined[done..].to_vec() });
        Ok(())
    }

    fn keep(&mut self, partial: Vec<u8>) {
        if partial.len() <= PARTIAL_BYTES_MAX {
            self.partial = partial;
        } else {
            self.failure = Some(rustls::Error::General("a message in too many records".to_owned()));
        }
    }

    /// Does everything that can be done with these bytes; returns how many of them are done with. What is to be sent for it (the
    /// handshake, tickets, changes of keys, an alert) is among the sealed bytes afterwards.
    fn process(&mut self, sealed: &mut [u8], plain: &mut ReadBuf<'_>) -> io::Result<usize> {
        let mut done = 0;
        loop {
            // After a failure there is only the alert to take. With nothing to send, rustls would go on where it was in bytes that it is
            // not given any more, and panic.
            if self.failure.is_some() && !self.tls.wants_write() {
                return Ok(sealed.len());
            }
            let rest: &mut [u8] = if self.failure.is_some() { &mut [] } else { &mut sealed[done..] };
            let UnbufferedStatus { mut discard, state } = self.tls.process_tls_records(rest);
            match state {
                Ok(ConnectionState::ReadTraffic(mut traffic)) => {
                    while let Some(record) = traffic.next_record() {
                        let record = record.map_err(invalid)?;
                        discard += record.discard;
                        // Behind what waits already, nothing overtakes.
                        let room = if self.plain.is_empty() { plain.remaining() } else { 0 };
                        let (now, later) = record.payload.split_at(room.min(record.payload.len()));
                        plain.put_slice(now);
                        self.plain.push(later);
                    }
                }
                Ok(ConnectionState::EncodeTlsData(mut data)) => {
                    let mut encoded = Vec::new();
                    if let Err(EncodeError::InsufficientSize(size)) = data.encode(&mut encoded) {
                        encoded.resize(size.required_size, 0);
                        data.encode(&mut encoded).map_err(io::Error::other)?;
                    }
                    self.sealed.push(&encoded);
                }
                // It is among the sealed bytes, which are written before anything else.
                Ok(ConnectionState::TransmitTlsData(data)) => data.done(),
                Ok(ConnectionState::PeerClosed) => self.is_ended = true,
                Ok(ConnectionState::ReadEarlyData(_)) => return Err(invalid("early data that nobody allowed")),
                Err(error) if self.failure.is_none() => self.failure = Some(error),
                // All of it is opened, more must come, or nothing more will; and whatever a later version knows besides.
                Ok(_) | Err(_) => return Ok(if self.failure.is_some() { sealed.len() } else { done + discard }),
            }
            done += discard;
        }
    }

    /// An error if the stream has failed and everything before that was read.
    fn check(&self) -> io::Result<()> {
        match &self.failure {
            Some(failure) if self.plain.is_empty() => Err(invalid(failure.clone())),
            _ => Ok(()),
        }
    }

    /// Seals plain bytes into a buffer; returns the sealed ones' length.
    fn seal(&mut self, plain: &[u8], sealed: &mut [u8]) -> io::Result<usize> {
        self.sealing(|tls| match tls {
            ConnectionState::WriteTraffic(mut traffic) => Some(traffic.encrypt(plain, sealed)),
            _ => None,
        })
    }

    /// The last record: nothing more comes.
    fn seal_end(&mut self) -> io::Result<()> {
        let mut last = [0; SEAL_BYTES];
        let count = self.sealing(|tls| match tls {
            ConnectionState::WriteTraffic(mut traffic) => Some(traffic.queue_close_notify(&mut last)),
            _ => None,
        });
        self.sealed.push(&last[..count?]);
        Ok(())
    }

    fn sealing(
        &mut self,
        seal: impl FnOnce(
            ConnectionState<'_, '_, rustls::server::ServerConnectionData>,
        ) -> Option<Result<usize, EncryptError>>,
    ) -> io::Result<usize> {
        // What must go before it.
        self.go_on(&mut ReadBuf::new(&mut []))?;
        if let Some(failure) = &self.failure {
            return Err(invalid(failure.clone()));
        }
        let UnbufferedStatus { state, .. } = self.tls.process_tls_records(&mut self.partial);
        match seal(state.map_err(invalid)?) {
            Some(sealed) => sealed.map_err(io::Error::other),
            None => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for TlsStream<S> {
    /// The end of the stream is only the peer's word for it: a connection that just ends is `UnexpectedEof`.
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            let waiting = this.session.plain.waiting();
            if !waiting.is_empty() {
                let count = waiting.len().min(buf.remaining());
                buf.put_slice(&waiting[..count]);
                this.session.plain.take(count);
                return Poll::Ready(Ok(()));
            }
            this.session.check()?;
            if this.session.is_ended || buf.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
            let before = buf.filled().len();
            let outcome = this.poll_more(cx, buf);
            // What the peer asked for, or an alert; the write side goes on with it if the socket takes no more now.
            let flushed = this.poll_sealed(cx);
            let count = ready!(outcome)?;
            if let Poll::Ready(Err(error)) = flushed {
                return Poll::Ready(Err(error));
            }
            if buf.filled().len() > before {
                return Poll::Ready(Ok(()));
            }
            if count == 0 && !this.session.is_ended && this.session.failure.is_none() {
                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for TlsStream<S> {
    /// Takes bytes only when all earlier ones are written, so what waits here is of one write.
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        ready!(this.poll_sealed(cx))?;
        let plain = &buf[..buf.len().min(WRITE_BYTES)];
        SEALED_OUT.with_borrow_mut(|sealed| {
            let count = this.session.seal(plain, sealed)?;
            let mut written = 0;
            // What had to go first, such as an answer to a change of keys, is among what waits.
            if this.session.sealed.is_empty() {
                match Pin::new(&mut this.stream).poll_write(cx, &sealed[..count]) {
                    Poll::Ready(Ok(count)) => written = count,
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                    Poll::Pending => {}
                }
            }
            this.session.sealed.push(&sealed[written..count]);
            Poll::Ready(Ok(plain.len()))
        })
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_sealed(cx))?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.session.is_closed {
            self.session.is_closed = true;
            self.session.seal_end()?;
        }
        ready!(self.poll_sealed(cx))?;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests;
