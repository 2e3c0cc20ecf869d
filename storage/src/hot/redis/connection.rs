//! The task that has the connection.

use std::{sync::Arc, time::Duration};

use im_proto::environment::Environment;
use redis::{
    AsyncConnectionConfig, Client, IntoConnectionInfo as _, Pipeline, RedisError, RedisResult, Value,
    aio::MultiplexedConnection,
    io::tcp::{TcpSettings, socket2::TcpKeepalive},
};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, timeout},
};

use super::{
    Metrics, RedisOptions,
    command::Request,
    refusal::{Refusal, Said},
};
use crate::model::StoreError;

/// Requests of one pipeline.
const REQUESTS_MAX: usize = 256;
/// Commands after which a pipeline takes no further request.
const COMMANDS_MAX: usize = 2_048;
/// Pauses between attempts to connect, and between connections to a server that says that it is the wrong one.
const PAUSE_FIRST: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// Probes of an idle connection.
const KEEPALIVE: Duration = Duration::from_secs(15);

/// Why a connection is given up.
enum Loss {
    Broken(String),
    /// What the server itself says.
    WrongServer(RedisError),
}

pub(super) struct Task {
    client: Client,
    options: RedisOptions,
    requests: mpsc::Receiver<Request>,
    metrics: Arc<Metrics>,
    environment: Environment,
}

impl Task {
    pub(super) fn new(
        options: RedisOptions,
        requests: mpsc::Receiver<Request>,
        metrics: Arc<Metrics>,
        environment: Environment,
    ) -> Result<Self, StoreError> {
        // The error would hold the address, and with it the password.
        let no_address = |_: RedisError| StoreError::Open("the address of Redis is none: redis://host:port".into());
        let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE);
        let tcp = TcpSettings::default().set_nodelay(true).set_keepalive(keepalive);
        let mut address = options.url.as_str().into_connection_info().map_err(no_address)?.set_tcp_settings(tcp);
        if let Some(password) = &options.password {
            let settings = address.redis_settings().clone().set_password(password);
            address = address.set_redis_settings(settings);
        }
        let client = Client::open(address).map_err(no_address)?;
        Ok(Self { client, options, requests, metrics, environment })
    }

    /// Connects and serves until the last handle is gone.
    pub(super) async fn run(mut self) {
        let mut pause = None;
        while let Some(mut connection) = self.connect(pause).await {
            let begun = Instant::now();
            self.metrics.connected.set(1.0);
            // Pauses grow as long as no connection to such a server holds longer than the longest of them; only the first is worth a word.
            if pause.is_none() {
                tracing::info!("connected to Redis");
            }
            let loss = self.serve(&mut connection).await;
            self.metrics.connected.set(0.0);
            pause = match loss {
                Some(Loss::Broken(failure)) => {
                    tracing::warn!(failure, "the connection to Redis is lost; hot state is unknown");
                    None
                }
                Some(Loss::WrongServer(error)) => {
                    let last = pause.filter(|_| begun.elapsed() <= PAUSE_MAX);
                    if last.is_none() {
                        tracing::warn!(%error, "this Redis refuses its service; hot state is unknown until there is another");
                    }
                    Some(last.map_or(PAUSE_FIRST, |last| (last * 2).min(PAUSE_MAX)))
                }
                None => return,
            };
        }
    }

    /// Tries until there is a connection, at once or after a pause; what is asked meanwhile is dropped, which answers it. Nothing if no
    /// handle is left.
    async fn connect(&mut self, first_pause: Option<Duration>) -> Option<MultiplexedConnection> {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(self.options.connect_timeout))
            .set_response_timeout(Some(self.options.response_timeout));
        let attempts = async {
            let mut pause = PAUSE_FIRST;
            if let Some(first) = first_pause {
                sleep(first + self.environment.jitter(first)).await;
                pause = first;
            }
            loop {
                // The limit of the driver covers connecting, ours also what it says after that.
                let attempt = self.client.get_multiplexed_async_connection_with_config(&config);
                match timeout(2 * self.options.connect_timeout, attempt).await {
                    Ok(Ok(connection)) => return connection,
                    Ok(Err(error)) => tracing::debug!(%error, "cannot connect to Redis"),
                    Err(_) => tracing::debug!("cannot connect to Redis in time"),
                }
                sleep(pause + self.environment.jitter(pause)).await;
                pause = (pause * 2).min(PAUSE_MAX);
            }
        };
        let mut dropped = Vec::new();
        tokio::pin!(attempts);
        loop {
            tokio::select! {
                biased;
                connection = &mut attempts => return Some(connection),
                count = self.requests.recv_many(&mut dropped, REQUESTS_MAX) => {
                    if count == 0 {
                        return None;
                    }
                    dropped.clear();
                }
            }
        }
    }

    /// Serves until the connection fails, and says why; nothing if no handle is left.
    async fn serve(&mut self, connection: &mut MultiplexedConnection) -> Option<Loss> {
        let mut said = Said::default();
        let mut waiting = Vec::with_capacity(REQUESTS_MAX);
        while self.requests.recv_many(&mut waiting, REQUESTS_MAX).await > 0 {
            self.metrics.queued.set(self.requests.len() as f64);
            let mut rest = waiting.drain(..).filter(|request| !request.is_abandoned()).peekable();
            while rest.peek().is_some() {
                let mut commands = 0;
                let mut requests = Vec::new();
                while commands < COMMANDS_MAX
                    && let Some(request) = rest.next()
                {
                    commands += request.commands();
                    requests.push(request);
                }
                if let Err(loss) = self.pipeline(connection, requests, commands, &mut said).await {
                    return Some(loss);
                }
            }
        }
        None
    }

    async fn pipeline(
        &self,
        connection: &mut MultiplexedConnection,
        requests: Vec<Request>,
        commands: usize,
        said: &mut Said,
    ) -> Result<(), Loss> {
        if commands == 0 {
            requests.into_iter().for_each(|request| request.answer(&mut std::iter::empty()));
            return Ok(());
        }
        let mut pipeline = Pipeline::with_capacity(commands);
        // One command that is refused (no memory left, a key of another type) leaves the others their answers.
        pipeline.ignore_errors();
        requests.iter().for_each(|request| request.put(&self.options.prefix, &mut pipeline));
        let begun = Instant::now();
        let answers = pipeline.query_async::<Vec<RedisResult<Value>>>(connection);
        let values = match timeout(self.options.response_timeout, answers).await {
            Ok(Ok(values)) => values,
            Ok(Err(error)) => return Err(Loss::Broken(error.to_string())),
            Err(_) => return Err(Loss::Broken("no answer in time".into())),
        };
        self.metrics.pipeline_seconds.record(begun.elapsed());
        self.metrics.pipeline_requests.record(requests.len() as f64);
        if values.len() != commands {
            return Err(Loss::Broken(format!("{} answers to {commands} commands", values.len())));
        }
        let mut loss = Ok(());
        let mut values =
            values.into_iter().map(|value| value.map_err(|error| self.refused(error, said, &mut loss)).ok());
        requests.into_iter().for_each(|request| request.answer(&mut values));
        loss
    }

    /// Counts an error, and says it unless it was said: of what makes another connection necessary, by whoever sees to that.
    fn refused(&self, error: RedisError, said: &mut Said, loss: &mut Result<(), Loss>) {
        let refusal = Refusal::of(&error);
        self.metrics.refusals.count(refusal);
        if refusal.is_of_the_wrong_server() {
            *loss = Err(Loss::WrongServer(error));
        } else if said.is_first(refusal) {
            tracing::warn!(kind = refusal.label(), %error, "Redis refuses commands; what they are about is unknown");
        }
    }
}
