//! Between the streams of a call and the two channels of a link's end.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use im_proto::{
    environment::Environment,
    link::{
        channel::{LinkEnd, LinkItem},
        wire::WireItem,
    },
};
use prost::Message;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tonic::{Status, Streaming};

use super::BATCHES_WAITING_MAX;

/// What one side sends, as the body of a request. It ends when the role gives up its end of the link.
pub struct Outgoing<Out>(mpsc::Receiver<LinkItem<Out>>);

impl<Out> Stream for Outgoing<Out> {
    type Item = WireItem<Out>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(cx).map(|item| item.map(|item| WireItem(Some(item))))
    }
}

/// The same as the body of an answer.
pub struct Answering<Out>(pub Outgoing<Out>);

impl<Out> Stream for Answering<Out> {
    type Item = Result<WireItem<Out>, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Pin::new(&mut self.0).poll_next(cx).map(|item| item.map(Ok))
    }
}

/// The direction away from here: the role's half and the stream's.
pub fn away<Out>() -> (mpsc::Sender<LinkItem<Out>>, Outgoing<Out>) {
    let (sender, items) = mpsc::channel(BATCHES_WAITING_MAX);
    (sender, Outgoing(items))
}

/// The end of a link for the role. What comes in is read by a task until either side ends it.
pub fn end<Out, In>(
    sender: mpsc::Sender<LinkItem<Out>>,
    incoming: Streaming<WireItem<In>>,
    environment: &Environment,
) -> LinkEnd<Out, In>
where
    WireItem<In>: Message + Default,
    In: Send + Sync + 'static,
{
    let (arrived, receiver) = mpsc::channel(BATCHES_WAITING_MAX);
    environment.spawn(take(incoming, arrived));
    LinkEnd { sender, receiver }
}

async fn take<In>(mut incoming: Streaming<WireItem<In>>, arrived: mpsc::Sender<LinkItem<In>>)
where
    WireItem<In>: Message + Default,
{
    loop {
        let item = tokio::select! {
            biased;
            // The role has given its end up; dropping the stream tells the other side.
            () = arrived.closed() => return,
            item = incoming.message() => item,
        };
        let item = match item {
            Ok(Some(WireItem(Some(item)))) => item,
            Ok(Some(WireItem(None))) => {
                return tracing::warn!("a link carries what this version does not know; it is dropped");
            }
            Ok(None) => return,
            Err(status) => return tracing::debug!(%status, "a link broke"),
        };
        if arrived.send(item).await.is_err() {
            return;
        }
    }
}
