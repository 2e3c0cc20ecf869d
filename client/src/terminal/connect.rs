//! From the command line to a configuration of the client.

use std::{
    env,
    future::Future,
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use crate::{
    config::{ClientConfig, Endpoint, EndpointSource, TokenSource, Transport},
    dial::{NetDialer, Trust},
    environment,
    error::ConfigError,
};

use super::{
    args::Connection,
    data_directory::{DataDirectory, DataToken},
    distrust::{Distrust, Judging},
    failure::Failure,
};

const NO_SERVER: &str = "no server is named; use --server URL (or IM_SERVER), or --as USER with the data directory of a local \
                         server";
const NO_TOKEN: &str = "no token; use --token T, --token-file F (or IM_TOKEN), or --as USER with the data directory of a local \
                        server";

const BEGIN: &[u8] = b"-----BEGIN CERTIFICATE-----";

/// Everything the client needs, and whether any server can be trusted.
pub(super) fn config(arguments: &Connection) -> Result<(ClientConfig, Distrust), Failure> {
    let environment = environment::system();
    let (endpoints, token, trust): (Arc<dyn EndpointSource>, Arc<dyn TokenSource>, Trust) = match &arguments.user {
        Some(user) => {
            if !arguments.server.is_empty() || arguments.token.is_some() || arguments.token_file.is_some() {
                let text = "--as takes address and token from --data; leave --server, --token and --token-file away";
                return Err(Failure::Usage(text.to_owned()));
            }
            let directory = DataDirectory::open(&arguments.data, arguments.transport)?;
            let token = DataToken::new(&arguments.data, user, environment.clone())?;
            let ca = arguments.ca.clone().unwrap_or_else(|| directory.ca());
            let trust = trust(&[arguments.transport], Some(ca))?;
            (Arc::new(directory), Arc::new(token), trust)
        }
        None => {
            let servers = servers(arguments)?;
            let transports: Vec<Transport> = servers.iter().map(|server| server.transport).collect();
            let ca = arguments.ca.clone().or_else(|| env::var_os("IM_CA").map(PathBuf::from));
            (Arc::new(servers), token(arguments)?, trust(&transports, ca)?)
        }
    };
    let (dialer, distrust) = Judging::new(Arc::new(NetDialer::new(&trust)?), endpoints.clone());
    let mut config = ClientConfig::with_dialer(endpoints, token, Arc::new(dialer), environment);
    config.client_name = "im".to_owned();
    config.ready_timeout = arguments.timeout();
    config.call_timeout = arguments.timeout();
    // A person waits, on a machine with power.
    config.heartbeat_longest = Duration::from_secs(2);
    Ok((config, distrust))
}

fn servers(arguments: &Connection) -> Result<Vec<Endpoint>, Failure> {
    if !arguments.server.is_empty() {
        return Ok(arguments.server.clone());
    }
    let text = env::var("IM_SERVER").map_err(|_| Failure::Usage(NO_SERVER.to_owned()))?;
    let servers = text.split(',').map(str::trim).filter(|text| !text.is_empty()).map(str::parse);
    let named = |error: ConfigError| Failure::Usage(format!("IM_SERVER: {error}"));
    let servers: Vec<Endpoint> = servers.collect::<Result<_, _>>().map_err(named)?;
    if servers.is_empty() { Err(Failure::Usage(NO_SERVER.to_owned())) } else { Ok(servers) }
}

fn token(arguments: &Connection) -> Result<Arc<dyn TokenSource>, Failure> {
    if let Some(path) = &arguments.token_file {
        read_token(path).map_err(Failure::Usage)?;
        return Ok(Arc::new(TokenFile(path.clone())));
    }
    match arguments.token.clone().or_else(|| env::var("IM_TOKEN").ok().filter(|token| !token.is_empty())) {
        Some(token) => Ok(Arc::new(token.trim().to_owned())),
        None => Err(Failure::Usage(NO_TOKEN.to_owned())),
    }
}

/// Loading the system's certificates takes a moment: only when they are needed.
fn trust(transports: &[Transport], ca: Option<PathBuf>) -> Result<Trust, Failure> {
    if transports.iter().all(|transport| *transport == Transport::Tcp) {
        return Ok(Trust::Nobody);
    }
    let Some(ca) = ca else { return Ok(Trust::SystemRoots) };
    let place = ca.display();
    let pem = std::fs::read(&ca).map_err(|error| {
        Failure::Usage(format!("--ca {place}: cannot be read: {error}; expected a PEM file of certificates"))
    })?;
    // Said here, where the file is known by its name.
    if !pem.windows(BEGIN.len()).any(|part| part == BEGIN) {
        return Err(Failure::Usage(format!("--ca {place}: there is no certificate in it; expected a PEM file")));
    }
    Ok(Trust::Pinned(pem))
}

fn read_token(path: &Path) -> Result<String, String> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| format!("--token-file {}: cannot be read: {error}", path.display()))?;
    match text.trim() {
        "" => Err(format!("--token-file {}: holds no token; `imd token --user U` makes one", path.display())),
        token => Ok(token.to_owned()),
    }
}

/// Something else may write a new token into the file before the old one expires.
struct TokenFile(PathBuf);

impl TokenSource for TokenFile {
    fn token(&self) -> Pin<Box<dyn Future<Output = Result<String, String>> + Send + '_>> {
        Box::pin(std::future::ready(read_token(&self.0)))
    }

    fn is_renewable(&self) -> bool {
        true
    }
}
