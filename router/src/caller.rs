//! Who asks: the identity of a session or of a gRPC call, taken from a verified token or capability, never from a request.

use im_proto::{
    ConversationId, DeviceId, InstanceId, Platform, SessionId, UserId, id::IdError, key::ClusterSecret,
    timestamp::Timestamp, v1,
};

/// A session at a gateway, as routers name it to each other.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionKey {
    pub gateway: InstanceId,
    pub session: SessionId,
}

/// An authenticated user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    pub user: UserId,
    pub device: DeviceId,
    pub platform: Platform,
    /// `None` for a gRPC caller.
    pub session: Option<SessionKey>,
    pub gateway_boot: u64,
    pub expires_at: Timestamp,
    /// When its client began to connect: orders the sessions of a device.
    pub opened_at: Timestamp,
    /// The user's self log, which also names the user's shard.
    pub self_id: ConversationId,
}

impl Caller {
    /// From a verified identity.
    pub fn from_identity(identity: &v1::Identity, secret: &ClusterSecret) -> Result<Self, IdError> {
        let user = UserId::parse(&identity.user_id)?;
        let session = if identity.gateway_id.is_empty() {
            None
        } else {
            let gateway = InstanceId::parse(&identity.gateway_id)?;
            Some(SessionKey { gateway, session: SessionId(identity.session_id) })
        };
        Ok(Self {
            self_id: secret.self_id(&user),
            user,
            device: DeviceId::parse(&identity.device_id)?,
            platform: Platform::parse(&identity.platform)?,
            session,
            gateway_boot: identity.gateway_boot_id,
            expires_at: Timestamp::from_millis(identity.expires_at_ms),
            opened_at: Timestamp::from_millis(identity.opened_at_ms),
        })
    }

    /// For the wire.
    pub fn to_identity(&self) -> v1::Identity {
        v1::Identity {
            user_id: self.user.to_string(),
            device_id: self.device.to_string(),
            platform: self.platform.to_string(),
            gateway_id: self.session.as_ref().map(|key| key.gateway.to_string()).unwrap_or_default(),
            gateway_boot_id: self.gateway_boot,
            session_id: self.session.as_ref().map_or(0, |key| key.session.0),
            expires_at_ms: self.expires_at.as_millis(),
            opened_at_ms: self.opened_at.as_millis(),
        }
    }
}
