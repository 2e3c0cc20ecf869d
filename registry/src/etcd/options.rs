//! How etcd is reached, and as whom.

use std::{fmt, time::Duration};

use etcd_client::{Certificate, ConnectOptions, Identity, TlsOptions};
use im_proto::Epoch;

use super::{ConnectError, keys::Keys};

/// The way to etcd and what to do there.
#[derive(Clone, Debug)]
pub struct EtcdOptions {
    /// `http://host:port` or `https://host:port` of the members. One is used at a time; a call that fails goes to the next.
    pub endpoints: Vec<String>,
    /// For `https` endpoints.
    pub tls: Option<EtcdTls>,
    /// Where etcd has authentication switched on.
    pub user: Option<EtcdUser>,
    /// Part of every key: several clusters can share one etcd.
    pub cluster_id: String,
    /// The generation that this process was started with, from the message store. `None` for one that never claims.
    pub generation: Option<u64>,
    /// The greatest claim that the message store knows of: an etcd that has not come so far has lost claims.
    pub claimed: Option<Epoch>,
    /// The longest wait for one answer of one member. 2 s: far above a commit of etcd on a slow disk (0.1 s), and two tries fit
    /// twice into a lease of 10 s.
    pub call_timeout: Duration,
    /// How often everything is read again, although the watch should have told of every change. 60 s: a reading costs etcd a few
    /// milliseconds, and this bounds how long a missed change can stay unseen.
    pub reconcile_interval: Duration,
    /// How long a view is held back that loses more than half of the instances at once: one lease, 10 s, in which they can renew
    /// or register again.
    pub hold: Duration,
}

impl EtcdOptions {
    /// For `endpoints`, with defaults for all else.
    pub fn new(endpoints: Vec<String>, cluster_id: &str, generation: Option<u64>) -> Self {
        Self {
            endpoints,
            tls: None,
            user: None,
            cluster_id: cluster_id.to_owned(),
            generation,
            claimed: None,
            call_timeout: Duration::from_secs(2),
            reconcile_interval: Duration::from_secs(60),
            hold: Duration::from_secs(10),
        }
    }

    /// All that is wrong with the options at once, or the keys of the cluster.
    pub(super) fn check(&self) -> Result<Keys, ConnectError> {
        let mut wrong = Vec::new();
        if self.endpoints.is_empty() {
            wrong.push("etcd needs at least one endpoint".to_owned());
        }
        for endpoint in &self.endpoints {
            let secure = endpoint.starts_with("https://");
            if !secure && !endpoint.starts_with("http://") {
                wrong.push(format!("the etcd endpoint {endpoint:?} must be http://host:port or https://host:port"));
            } else if secure != self.tls.is_some() {
                wrong.push(format!("the etcd endpoint {endpoint:?} must be https exactly if TLS is configured"));
            }
        }
        for (name, value) in
            [("call timeout", self.call_timeout), ("reconcile interval", self.reconcile_interval), ("hold", self.hold)]
        {
            if value.is_zero() {
                wrong.push(format!("the {name} of the registry must be above 0"));
            }
        }
        match (Keys::new(&self.cluster_id), wrong.is_empty()) {
            (Some(keys), true) => Ok(keys),
            (keys, _) => {
                if keys.is_none() {
                    wrong.push(format!(
                        "the cluster id {:?} must be 1 to 64 bytes without / and white space",
                        self.cluster_id
                    ));
                }
                Err(ConnectError::Options(wrong.join("; ")))
            }
        }
    }

    pub(super) fn connect_options(&self) -> ConnectOptions {
        let mut options = ConnectOptions::new()
            .with_connect_timeout(self.call_timeout)
            // etcd closes connections that ping more often than every 5 s.
            .with_keep_alive(Duration::from_secs(7), Duration::from_secs(3))
            .with_keep_alive_while_idle(true)
            // A member without a leader refuses at once instead of keeping a watch open that is silent.
            .with_require_leader(true)
            .with_auto_token_refresh(true);
        if let Some(user) = &self.user {
            options = options.with_user(user.name.clone(), user.password.clone());
        }
        if let Some(tls) = &self.tls {
            options = options.with_tls(tls.options());
        }
        options
    }
}

/// TLS to etcd, by rustls. Only the named CA is trusted.
#[derive(Clone)]
pub struct EtcdTls {
    /// Who signs the members' certificates (PEM).
    pub ca_pem: Vec<u8>,
    /// This process's certificate and key (PEM), where etcd asks for one.
    pub identity: Option<(Vec<u8>, Vec<u8>)>,
    /// The name in the members' certificates, if it is not the host of the endpoint.
    pub server_name: Option<String>,
}

impl EtcdTls {
    fn options(&self) -> TlsOptions {
        let mut options = TlsOptions::new().ca_certificate(Certificate::from_pem(&self.ca_pem));
        if let Some((certificate, key)) = &self.identity {
            options = options.identity(Identity::from_pem(certificate, key));
        }
        if let Some(name) = &self.server_name {
            options = options.domain_name(name.clone());
        }
        options
    }
}

impl fmt::Debug for EtcdTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdTls").field("server_name", &self.server_name).finish_non_exhaustive()
    }
}

/// A user of etcd.
#[derive(Clone)]
pub struct EtcdUser {
    pub name: String,
    pub password: String,
}

impl fmt::Debug for EtcdUser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdUser").field("name", &self.name).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_problems_are_reported_at_once() {
        let mut options = EtcdOptions::new(vec!["localhost:2379".into(), "https://b:2379".into()], "a/b", None);
        options.hold = Duration::ZERO;
        let Err(ConnectError::Options(text)) = options.check() else { panic!("accepted") };
        for part in ["localhost:2379", "https://b:2379", "cluster id \"a/b\"", "the hold"] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert!(EtcdOptions::new(Vec::new(), "a", None).check().is_err());
        assert!(EtcdOptions::new(vec!["http://a:1".into()], "a", None).check().is_ok());
    }

    #[test]
    fn secrets_are_not_printed() {
        let mut options = EtcdOptions::new(vec!["https://a:1".into()], "a", None);
        options.user = Some(EtcdUser { name: "im".into(), password: "geheim".into() });
        options.tls =
            Some(EtcdTls { ca_pem: b"c".to_vec(), identity: Some((vec![1], b"geheim".to_vec())), server_name: None });
        assert!(!format!("{options:?}").contains("geheim"));
    }
}
