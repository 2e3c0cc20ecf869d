//! Prints what this user has not read yet, in all conversations, and marks it as read.
//!
//! ```text
//! imd up &
//! export IM_TOKEN=$(imd token --user bob)
//! cargo run -p im-client --example unread -- tcp://127.0.0.1:7100
//! ```

use std::{env, error::Error};

use im_client::{Client, ClientConfig, Endpoint, Target, Trust};
use im_proto::{ConversationId, v1};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let server = env::args().nth(1).ok_or("usage: unread SERVER")?;
    let endpoints: Vec<Endpoint> = vec![server.parse()?];
    let client = Client::connect(ClientConfig::new(endpoints, env::var("IM_TOKEN")?, &Trust::SystemRoots)?).await?;

    for row in client.conversations().await? {
        if row.left || row.unread == 0 {
            continue;
        }
        let conversation = Target::Conversation(ConversationId::from_slice(&row.conversation_id)?);
        let name = if row.name.is_empty() { &row.peer_user_id } else { &row.name };
        let mut next = row.read_seq + 1;
        // An answer holds as much as fits; the next one goes on from there.
        while next <= row.head {
            let page = client.history(conversation.clone(), next, row.head, 0, false).await?;
            let Some(last) = page.entries.last() else { break };
            next = last.seq + 1;
            for entry in page.entries {
                if let Some(v1::body::Content::Text(text)) = entry.decode_body().and_then(|body| body.content) {
                    let sender = entry.sender.map(|sender| sender.to_string()).unwrap_or_default();
                    println!("{name} {} {sender}: {}", entry.seq, text.text);
                }
            }
        }
        client.mark_read(conversation, row.head).await?;
    }
    client.close().await;
    Ok(())
}
