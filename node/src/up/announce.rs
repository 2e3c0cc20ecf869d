//! What a person sees when the server is up: where it listens, and what to paste next.

use std::{fmt::Write as _, path::Path};

use crate::{config::Config, failure::Failure, listen::Addresses, print};

/// Prints it to standard output.
pub fn print_addresses(config: &Config, addresses: &Addresses) -> Result<(), Failure> {
    print(&text(config, addresses, &client_command()))
}

fn text(config: &Config, addresses: &Addresses, im: &str) -> String {
    let mut text = format!("imd {} listens:\n", env!("CARGO_PKG_VERSION"));
    let lines = [
        ("tcp", "", "clients, without TLS", addresses.tcp),
        ("tls", "", "clients", addresses.tls),
        ("quic", "", "clients", addresses.quic),
        ("api", "http", "gRPC for other services", addresses.api),
        ("http", "http", "/metrics, /healthz, /readyz", addresses.http),
    ];
    for (name, scheme, purpose, address) in lines {
        if let Some(address) = address {
            let scheme = if scheme.is_empty() { name } else { scheme };
            let _ = writeln!(text, "  {name:<5} {:<28} {purpose}", format!("{scheme}://{address}"));
        }
    }
    let data = quoted(&config.data);
    let _ = write!(
        text,
        "\nTry it in other terminals:\n  \
         {im} tail @alice --as bob --data {data}\n  \
         {im} send @bob hello --as alice --data {data}\n  \
         {im} list --as bob --data {data}\n\
         Stop with Ctrl-C.\n"
    );
    text
}

/// How to call the client: the one beside this program if it is built, else by way of cargo.
fn client_command() -> String {
    let beside = std::env::current_exe().ok().map(|path| path.with_file_name("im")).filter(|path| path.exists());
    match beside {
        Some(path) => {
            let here = std::env::current_dir().unwrap_or_default();
            quoted(path.strip_prefix(&here).unwrap_or(&path))
        }
        None if Path::new("client/Cargo.toml").exists() => {
            "cargo run --quiet --release -p im-client --bin im --".to_owned()
        }
        None => "im".to_owned(),
    }
}

/// As a shell takes it.
fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = text.chars().all(|c| c.is_ascii_alphanumeric() || "/._-+".contains(c));
    if plain && !text.is_empty() { text } else { format!("'{}'", text.replace('\'', "'\\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_can_be_pasted() {
        let config = Config { data: "my data".into(), ..Config::default() };
        let addresses = Addresses { quic: config.quic, ..Addresses::default() };
        let text = text(&config, &addresses, "target/release/im");
        assert!(text.contains("quic://127.0.0.1:7101 "), "{text}");
        assert!(text.contains("\n  target/release/im tail @alice --as bob --data 'my data'\n"), "{text}");
        assert!(!text.contains("tls"), "{text}");
    }
}
