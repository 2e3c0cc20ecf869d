//! The user's own devices.

use im_proto::{DeviceId, method::Method, v1};

use super::Client;
use crate::error::CallError;

impl Client {
    /// The devices of this user, at most [`im_proto::limits::DEVICES_MAX`]: the connected ones first, then by when they were last seen.
    pub async fn devices(&self) -> Result<Vec<v1::Device>, CallError> {
        let reply: v1::DeviceListReply = self.call(Method::DeviceList, &v1::DeviceListRequest {}).await?;
        Ok(reply.devices)
    }

    /// Ends the session of one of this user's devices, at whatever gateway it is; whether it had one (a repetition after a lost answer
    /// finds none). Its client does not come back by itself, but its token still holds: whoever uses it again is let in.
    pub async fn kick_device(&self, device: &DeviceId) -> Result<bool, CallError> {
        let request = v1::DeviceKickRequest { device_id: device.to_string() };
        let reply: v1::DeviceKickReply = self.call(Method::DeviceKick, &request).await?;
        Ok(reply.was_connected)
    }
}
