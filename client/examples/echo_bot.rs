//! Answers every text that others write to this user, in all conversations, old and new.
//!
//! ```text
//! imd up &
//! export IM_TOKEN=$(imd token --user echo)
//! cargo run -p im-client --example echo_bot -- tcp://127.0.0.1:7100
//! ```

use std::{env, error::Error};

use im_client::{Client, ClientConfig, Endpoint, Event, FollowAll, Trust};
use im_proto::{body, v1};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let server = env::args().nth(1).ok_or("usage: echo_bot SERVER")?;
    let endpoints: Vec<Endpoint> = vec![server.parse()?];
    let mut config = ClientConfig::new(endpoints, env::var("IM_TOKEN")?, &Trust::SystemRoots)?;
    config.follow_all = FollowAll::FromNow;
    let client = Client::connect(config).await?;
    let mut events = client.events().ok_or("the events are taken")?;

    while let Some(event) = events.recv().await {
        match event {
            // Its own answers are events, too.
            Event::Message(entry) if !entry.own => {
                let Some(v1::body::Content::Text(text)) = entry.decode_body().and_then(|body| body.content) else {
                    continue;
                };
                // Waits only while 256 answers are unacknowledged; they are stored in this order, also across reconnects.
                let answer = body::text(format!("you said: {}", text.text));
                let pending = client.enqueue(entry.conversation.into(), answer).await?;
                // The bot need not know where its answer stands.
                drop(pending);
            }
            Event::Closed(reason) => return Err(reason.into()),
            _ => {}
        }
    }
    Ok(())
}
