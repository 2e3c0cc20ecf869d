//! Makes a group over TLS or QUIC with a pinned certificate authority, and says something in it. With several servers the client
//! takes the next one when a connection breaks or cannot be had.
//!
//! ```text
//! imd up &
//! export IM_TOKEN=$(imd token --user alice)
//! cargo run -p im-client --example group -- tls://127.0.0.1:7101,quic://127.0.0.1:7101 data/ca.pem walkers bob carol
//! ```

use std::{env, error::Error};

use im_client::{Client, ClientConfig, Endpoint, Trust};
use im_proto::{UserId, body};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = env::args().skip(1);
    let usage = "usage: group SERVER[,SERVER…] CA_FILE NAME USER…";
    let servers = arguments.next().ok_or(usage)?;
    let endpoints = servers.split(',').map(str::parse).collect::<Result<Vec<Endpoint>, _>>()?;
    // Trusts what this authority has signed and nobody else: the server's own for development, or that of a company.
    let trust = Trust::Pinned(std::fs::read(arguments.next().ok_or(usage)?)?);
    let name = arguments.next().ok_or(usage)?;
    let others = arguments.map(|user| UserId::parse(&user)).collect::<Result<Vec<_>, _>>()?;

    let client = Client::connect(ClientConfig::new(endpoints, env::var("IM_TOKEN")?, &trust)?).await?;
    let group = client.create_group(&name, &others).await?;
    let sent = client.send(group.into(), body::text(format!("Welcome to {name}"))).await?;
    println!("{group} {}", sent.seq);
    for member in client.members(group).await? {
        println!("{}", member.user_id);
    }
    client.close().await;
    Ok(())
}
