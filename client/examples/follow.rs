//! Follows one conversation from a seq on: first what is stored, then what comes. This is how an application that keeps its own copy
//! goes on where it stopped.
//!
//! ```text
//! imd up &
//! export IM_TOKEN=$(imd token --user bob)
//! cargo run -p im-client --example follow -- tcp://127.0.0.1:7100 alice 1
//! ```

use std::{env, error::Error};

use im_client::{Client, ClientConfig, Endpoint, Event, Position, Target, Trust};
use im_proto::v1;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = env::args().skip(1);
    let usage = "usage: follow SERVER USER SEQ";
    let endpoints: Vec<Endpoint> = vec![arguments.next().ok_or(usage)?.parse()?];
    let target = Target::peer(&arguments.next().ok_or(usage)?)?;
    let from = Position::Seq(arguments.next().ok_or(usage)?.parse()?);

    let config = ClientConfig::new(endpoints, env::var("IM_TOKEN")?, &Trust::SystemRoots)?;
    let client = Client::connect(config).await?;
    let mut events = client.events().ok_or("the events are taken")?;
    client.follow(target, from).await?;

    while let Some(event) = events.recv().await {
        match event {
            // Each seq once and in order, whatever happens to the connection: the next to ask for is always `seq + 1`.
            Event::Message(entry) => match entry.decode_body().and_then(|body| body.content) {
                Some(v1::body::Content::Text(text)) => println!("{}: {}", entry.seq, text.text),
                _ => println!("{}: (no text)", entry.seq),
            },
            Event::Disconnected { reason } => eprintln!("disconnected ({reason}), connecting again"),
            Event::Closed(reason) => return Err(reason.into()),
            _ => {}
        }
    }
    Ok(())
}
