//! Sends texts to a user and prints where they are stored.
//!
//! ```text
//! imd up &
//! export IM_TOKEN=$(imd token --user alice)
//! cargo run -p im-client --example send -- tcp://127.0.0.1:7100 bob "Hello, Bob" "How are you?"
//! ```

use std::{env, error::Error};

use im_client::{Client, ClientConfig, Endpoint, Target, Trust};
use im_proto::body;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = env::args().skip(1);
    let usage = "usage: send SERVER USER TEXT…";
    let endpoints: Vec<Endpoint> = vec![arguments.next().ok_or(usage)?.parse()?];
    let target = Target::peer(&arguments.next().ok_or(usage)?)?;

    let config = ClientConfig::new(endpoints, env::var("IM_TOKEN")?, &Trust::SystemRoots)?;
    let client = Client::connect(config).await?;

    // Handed over one after the other, they are stored in this order, without waiting for each other.
    let mut pending = Vec::new();
    for text in arguments {
        pending.push(client.enqueue(target.clone(), body::text(text)).await?);
    }
    // Each outcome means: durable, at that place, once.
    for outcome in pending {
        let sent = outcome.await?;
        println!("{} {}", sent.conversation, sent.seq);
    }
    client.close().await;
    Ok(())
}
