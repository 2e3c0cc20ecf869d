//! The rows of a user's devices, each in a slot of the user's partition. Pure: no I/O, no clock.
//!
//! A slot is written over, never deleted, so the partition never has more than `DEVICES_MAX` rows, and no deleted ones that a scan would
//! have to pass. A row's timestamp is when it was written, or one more than that of the row before: an owner that writes late does not
//! win over the next one.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use bytes::Bytes;
use im_proto::{ConversationId, DeviceId, Platform, Timestamp, limits, v1};
use im_storage::{StateRow, StateWrite, Table};
use prost::Message as _;

/// The row of a connected device is not older than this, so that it is nearly right when nobody can say that the device has left.
pub const CONNECTED_FOR: Duration = Duration::from_secs(3600);
/// A device that has left is not written for that if its row is younger: one that comes and goes all the time is written once in so long.
pub const LEFT_FOR: Duration = Duration::from_secs(600);

/// The value of `Table::Devices`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct DeviceValue {
    #[prost(string, tag = "1")]
    pub device_id: String,
    #[prost(string, tag = "2")]
    pub platform: String,
    #[prost(string, tag = "3")]
    pub client_name: String,
    #[prost(string, tag = "4")]
    pub client_version: String,
    #[prost(int64, tag = "5")]
    pub first_seen_ms: i64,
    #[prost(int64, tag = "6")]
    pub last_seen_ms: i64,
}

/// What its owner has seen of a device since the row was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sighting {
    pub platform: Platform,
    /// Name and version of the client, if it has said Hello since.
    pub client: Option<(String, String)>,
    pub first: Timestamp,
    pub last: Timestamp,
}

impl Sighting {
    pub fn at(platform: Platform, now: Timestamp) -> Self {
        Self { platform, client: None, first: now, last: now }
    }

    /// Takes in a later one.
    pub fn merge(&mut self, later: Self) {
        self.platform = later.platform;
        self.client = later.client.or(self.client.take());
        self.first = self.first.min(later.first);
        self.last = self.last.max(later.last);
    }

    /// What it shows of the device beyond what is known.
    pub fn show(&self, device: &mut v1::Device) {
        device.platform = self.platform.to_string();
        if let Some((name, version)) = &self.client {
            device.client_name.clone_from(name);
            device.client_version.clone_from(version);
        }
        if device.first_seen_ms == 0 {
            device.first_seen_ms = self.first.as_millis();
        }
        device.last_seen_ms = device.last_seen_ms.max(self.last.as_millis());
    }
}

/// Whether a row that tells of one moment is to be written again at another. A clock that was set back makes it so, too.
pub fn is_old(stored: Timestamp, now: Timestamp, holds: Duration) -> bool {
    u128::from(now.as_millis().abs_diff(stored.as_millis())) >= holds.as_millis()
}

/// The rows of one user.
#[derive(Debug, Default)]
pub struct Rows {
    devices: BTreeMap<DeviceId, (u8, DeviceValue)>,
    /// The timestamp of each slot that was ever written.
    written: BTreeMap<u8, u64>,
}

impl Rows {
    /// What was read. A device in two slots, which two owners may have put there, is in the one that has seen it last; what cannot be
    /// read is room for others.
    pub fn of(rows: &[StateRow]) -> Self {
        let mut out = Self::default();
        for row in rows {
            let [slot] = row.key[..] else { continue };
            out.written.insert(slot, row.timestamp);
            let Ok(value) = DeviceValue::decode(row.value.clone()) else { continue };
            let Ok(device) = DeviceId::parse(&value.device_id) else { continue };
            let known = out.devices.get(&device).map(|(_, known)| known.last_seen_ms);
            if known.is_none_or(|known| known < value.last_seen_ms) {
                out.devices.insert(device, (slot, value));
            }
        }
        out
    }

    /// As the api shows them.
    pub fn show(&self) -> BTreeMap<DeviceId, v1::Device> {
        let show = |(device, (_, value)): (&DeviceId, &(u8, DeviceValue))| {
            let DeviceValue { device_id, platform, client_name, client_version, first_seen_ms, last_seen_ms } =
                value.clone();
            let shown = v1::Device {
                device_id,
                platform,
                client_name,
                client_version,
                first_seen_ms,
                last_seen_ms,
                ..v1::Device::default()
            };
            (device.clone(), shown)
        };
        self.devices.iter().map(show).collect()
    }

    /// Whether there is a row of a device.
    pub fn has(&self, device: &DeviceId) -> bool {
        self.devices.contains_key(device)
    }

    /// When a device was seen last, as its row says.
    pub fn last_seen(&self, device: &DeviceId) -> Option<Timestamp> {
        self.devices.get(device).map(|(_, value)| Timestamp::from_millis(value.last_seen_ms))
    }

    /// Takes in what was seen of a device; the row to write, if one is called for. Without a free slot a new device takes the place of
    /// the one that was seen longest ago and is not connected.
    pub fn see(
        &mut self,
        self_id: &ConversationId,
        device: &DeviceId,
        seen: &Sighting,
        connected: &BTreeSet<DeviceId>,
    ) -> Option<StateWrite> {
        let holds = if connected.contains(device) { CONNECTED_FOR } else { LEFT_FOR };
        let (slot, value) = match self.devices.get(device) {
            Some((slot, known)) => {
                let value = updated(known, seen);
                let is_news = DeviceValue { last_seen_ms: known.last_seen_ms, ..value.clone() } != *known;
                if !is_news && !is_old(Timestamp::from_millis(known.last_seen_ms), seen.last, holds) {
                    return None;
                }
                (*slot, value)
            }
            None => {
                let first_seen_ms = seen.first.as_millis();
                let new = DeviceValue { device_id: device.to_string(), first_seen_ms, ..DeviceValue::default() };
                (self.room(connected)?, updated(&new, seen))
            }
        };
        let at = u64::try_from(seen.last.as_millis()).unwrap_or_default();
        let timestamp = self.written.get(&slot).map_or(at, |before| at.max(before + 1));
        self.written.insert(slot, timestamp);
        let encoded = Bytes::from(value.encode_to_vec());
        self.devices.insert(device.clone(), (slot, value));
        Some(StateWrite {
            table: Table::Devices,
            partition: self_id.to_bytes(),
            key: Bytes::copy_from_slice(&[slot]),
            value: Some(encoded),
            timestamp,
        })
    }

    /// A slot for a new device.
    fn room(&mut self, connected: &BTreeSet<DeviceId>) -> Option<u8> {
        let taken: BTreeSet<u8> = self.devices.values().map(|(slot, _)| *slot).collect();
        let mut slots = (0..limits::DEVICES_MAX).filter_map(|slot| u8::try_from(slot).ok());
        if let Some(free) = slots.find(|slot| !taken.contains(slot)) {
            return Some(free);
        }
        let away = self.devices.iter().filter(|(device, _)| !connected.contains(*device));
        let oldest = away.min_by_key(|(_, (_, value))| value.last_seen_ms).map(|(device, _)| device.clone())?;
        self.devices.remove(&oldest).map(|(slot, _)| slot)
    }
}

fn updated(known: &DeviceValue, seen: &Sighting) -> DeviceValue {
    let mut value = known.clone();
    value.platform = seen.platform.to_string();
    if let Some((name, version)) = &seen.client {
        value.client_name.clone_from(name);
        value.client_version.clone_from(version);
    }
    value.last_seen_ms = seen.last.as_millis();
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: ConversationId = ConversationId::from_bytes([1; 16]);

    fn device(number: usize) -> DeviceId {
        DeviceId::parse(&format!("d{number}")).unwrap()
    }

    fn at(seconds: i64) -> Sighting {
        Sighting::at(Platform::parse("terminal").unwrap(), Timestamp::from_millis(seconds * 1000))
    }

    fn named(seconds: i64, version: &str) -> Sighting {
        Sighting { client: Some(("im".to_owned(), version.to_owned())), ..at(seconds) }
    }

    fn stored(write: &StateWrite) -> StateRow {
        StateRow { key: write.key.clone(), value: write.value.clone().unwrap(), timestamp: write.timestamp }
    }

    /// The devices that are connected.
    fn with(devices: &[DeviceId]) -> BTreeSet<DeviceId> {
        devices.iter().cloned().collect()
    }

    #[test]
    fn a_row_is_written_for_news_and_otherwise_when_it_is_old() {
        let (d, here, away) = (device(1), with(&[device(1)]), with(&[]));
        let first = Rows::default().see(&ID, &d, &named(1000, "1"), &here).unwrap();
        let rows = || Rows::of(&[stored(&first)]);
        for (seen, connected, is_written) in [
            (named(1000, "1"), &here, false),
            (at(1001), &here, false),
            (at(1000 + 3599), &here, false),
            (at(1000 + 3600), &here, true),
            (at(1000 + 599), &away, false),
            (at(1000 + 600), &away, true),
            (named(1001, "2"), &here, true),
            (Sighting { platform: Platform::parse("phone").unwrap(), ..at(1001) }, &here, true),
            // The clock was ahead, and is right again.
            (at(1000 - 3600), &here, true),
        ] {
            assert_eq!(rows().see(&ID, &d, &seen, connected).is_some(), is_written, "{seen:?}");
        }
        let mut rows = rows();
        let second = rows.see(&ID, &d, &at(1000 + 3600), &here).unwrap();
        assert_eq!((&second.key, second.timestamp), (&first.key, 4_600_000));
        let shown = rows.show().remove(&d).unwrap();
        assert_eq!((shown.first_seen_ms, shown.last_seen_ms), (1_000_000, 4_600_000));
        assert_eq!((shown.client_name.as_str(), shown.client_version.as_str()), ("im", "1"), "what is not said stays");
    }

    #[test]
    fn a_slot_is_written_with_ever_greater_timestamps_whatever_the_clock() {
        let (d, here) = (device(1), with(&[device(1)]));
        let mut rows = Rows::default();
        let mut before = 0;
        for seconds in [1_000_000, 5_000, -5, 2_000_000] {
            let write = rows.see(&ID, &d, &at(seconds), &here).unwrap();
            assert!(write.timestamp > before);
            before = write.timestamp;
        }
    }

    #[test]
    fn who_was_seen_longest_ago_and_is_away_makes_room() {
        let mut rows = Rows::default();
        for number in 0..limits::DEVICES_MAX {
            let seconds = 1_000 + i64::try_from(number).unwrap();
            assert!(rows.see(&ID, &device(number), &at(seconds), &with(&[])).is_some());
        }
        // The first one is connected, so the second goes.
        let (new, here) = (device(1000), with(&[device(0), device(1000)]));
        let write = rows.see(&ID, &new, &at(5_000), &here).unwrap();
        assert_eq!(write.key[..], [1]);
        assert!(rows.has(&new) && rows.has(&device(0)) && !rows.has(&device(1)));
        assert_eq!(rows.show().len(), limits::DEVICES_MAX);
        // If all are connected, it has no row.
        let all: BTreeSet<DeviceId> = rows.show().into_keys().collect();
        assert!(rows.see(&ID, &device(1001), &at(6_000), &all).is_none());
        assert_eq!(rows.show().len(), limits::DEVICES_MAX);
    }

    #[test]
    fn what_cannot_be_read_and_what_is_there_twice_is_room_for_others() {
        let mut rows = Rows::default();
        let older = rows.see(&ID, &device(1), &at(1_000), &with(&[])).unwrap();
        let newer = Rows::default().see(&ID, &device(1), &at(2_000), &with(&[])).unwrap();
        let twice = StateRow { key: Bytes::from_static(&[1]), ..stored(&newer) };
        let damaged =
            StateRow { key: Bytes::from_static(&[2]), value: Bytes::from_static(b"\xff"), timestamp: 9_999_999 };
        let foreign = StateRow { key: Bytes::from_static(b"two"), ..stored(&newer) };
        let mut rows = Rows::of(&[stored(&older), twice, damaged, foreign]);
        assert_eq!(rows.last_seen(&device(1)), Some(Timestamp::from_millis(2_000_000)));
        let write = rows.see(&ID, &device(2), &at(3_000), &with(&[])).unwrap();
        assert_eq!(write.key[..], [0]);
        let write = rows.see(&ID, &device(3), &at(3_000), &with(&[])).unwrap();
        assert_eq!((&write.key[..], write.timestamp), (&[2][..], 10_000_000));
    }

    #[test]
    fn a_later_sighting_adds_to_an_earlier_one_and_forgets_nothing() {
        let mut seen = named(1_000, "1");
        seen.merge(at(2_000));
        assert_eq!(seen, Sighting { last: Timestamp::from_millis(2_000_000), ..named(1_000, "1") });
        seen.merge(named(1_500, "2"));
        assert_eq!(seen, Sighting { last: Timestamp::from_millis(2_000_000), ..named(1_000, "2") });
    }
}
