//! `imd` and `im` clients as a test sees them.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::Duration,
};

use im_client::{Client, ClientConfig, Endpoint, Transport, Trust};

pub fn imd(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_imd")).args(arguments).env_clear().output().expect("imd runs")
}

pub fn code(output: &Output) -> i32 {
    output.status.code().expect("it was not killed")
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

const LOOK_INTERVAL: Duration = Duration::from_millis(5);

/// A server that is killed when the test is over.
pub struct Server {
    pub child: Child,
    pub data: PathBuf,
}

fn log(data: &Path) -> PathBuf {
    data.with_extension("log")
}

pub const ANY: [&str; 10] = [
    "--tcp",
    "127.0.0.1:0",
    "--tls",
    "127.0.0.1:0",
    "--quic",
    "127.0.0.1:0",
    "--api",
    "127.0.0.1:0",
    "--http",
    "127.0.0.1:0",
];

impl Server {
    /// Returns when `ready.json` names this process.
    pub fn start(data: &Path, arguments: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_imd"));
        command.args(["up", "--data", data.to_str().unwrap()]).args(arguments);
        Self::run(data, command)
    }

    /// Runs a command that becomes a server.
    pub fn run(data: &Path, command: Command) -> Self {
        Self::try_run(data, command).unwrap_or_else(|said| panic!("the server ended: {said}"))
    }

    /// The same; what it said, if it ended instead.
    pub fn try_run(data: &Path, mut command: Command) -> Result<Self, String> {
        let log = File::create(log(data)).unwrap();
        let child = command.env_clear().stdout(Stdio::null()).stderr(log).spawn().unwrap();
        let mut server = Self { child, data: data.to_owned() };
        while server.ready()["pid"] != server.child.id() {
            if server.child.try_wait().unwrap().is_some() {
                return Err(server.said());
            }
            std::thread::sleep(LOOK_INTERVAL);
        }
        Ok(server)
    }

    pub fn said(&self) -> String {
        std::fs::read_to_string(log(&self.data)).unwrap()
    }

    pub fn ready(&self) -> serde_json::Value {
        let text = std::fs::read(self.data.join("ready.json")).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }

    pub fn address(&self, name: &str) -> String {
        self.ready()[name].as_str().unwrap().to_owned()
    }

    pub fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &id]).status().unwrap().success());
    }

    pub fn get(&self, path: &str) -> String {
        let mut stream = TcpStream::connect(self.address("http")).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended as the test wanted it to.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    /// A token of a user of this server.
    pub fn token(&self, user: &str) -> String {
        stdout(&imd(&["token", "--user", user, "--data", self.data.to_str().unwrap()])).trim().to_owned()
    }

    /// A client with one message in flight.
    pub async fn client(&self, user: &str) -> Client {
        let token = self.token(user);
        let endpoint = Endpoint::new(Transport::Tcp, self.address("tcp")).unwrap();
        let mut config = ClientConfig::new(vec![endpoint], token, &Trust::SystemRoots).unwrap();
        // One message a commit, so that the store meets the end of the disk at whatever step comes next.
        config.window = 1;
        Client::connect(config).await.unwrap()
    }
}
