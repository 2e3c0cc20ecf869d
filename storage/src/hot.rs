//! Hot state: what is read often and may vanish at any time.
//!
//! Heads of conversations, who is online and was last seen when, and counts for rate limits. Nothing here is the truth of anything: a
//! reader who finds nothing asks the owner, and when counts vanish a rate limit is looser for one window. So every failure is the same
//! answer, *unknown*; nothing is ever waited for longer than a fraction of a second; and what does not fit into a queue is dropped.
//!
//! What is stored is either the newest of several versions (an older one never replaces it, whoever writes later) or a count. Backends
//! offer those two; the rest of this page says what they are used for.

mod limit;
pub mod memory;
pub mod redis;

use std::{future::Future, time::Duration};

use im_proto::{ConversationId, Timestamp, UserId};

pub use self::{
    limit::{Charge, Limit},
    memory::MemoryHot,
    redis::{RedisHot, RedisOptions},
};

/// How long a head is remembered without being raised again.
pub const HEAD_LIFETIME: Duration = Duration::from_secs(60 * 60);
/// How long a user who is gone is remembered.
pub const PRESENCE_LIFETIME: Duration = Duration::from_secs(30 * 24 * 60 * 60);
/// Bytes of the subject of a rate limit.
pub const SUBJECT_BYTES_MAX: usize = 128;

/// What a backend stores hints under.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum HintKey {
    Head(ConversationId),
    Presence(UserId),
}

/// Something that may be known. Of several the one with the greatest version stays; at the same version the later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hint {
    pub version: u64,
    /// What the version says: depends on the key.
    pub numbers: [i64; 2],
}

/// How far a conversation has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HotHead {
    /// The committed head.
    pub seq: u64,
    /// Entries up to it that count as unread.
    pub counted: u64,
}

/// Whether a user is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Presence {
    /// Until when the user counts as online without a further word: the owner of the user's sessions says it again in time, and when
    /// that owner dies the user goes offline by itself. In the past for who has left.
    pub online_until: Timestamp,
    pub last_seen: Timestamp,
}

impl Presence {
    /// Whether the user is online.
    pub fn is_online(&self, now: Timestamp) -> bool {
        now < self.online_until
    }
}

/// A store of hints and counts.
pub trait HotState: Send + Sync {
    /// Stores hints, each for so long, unless there is a greater version. Never waits; what does not fit is dropped.
    fn raise(&self, hints: Vec<(HintKey, Hint, Duration)>);

    /// One answer for each key, `None` for what is not known or could not be read in time.
    fn read(&self, keys: Vec<HintKey>) -> impl Future<Output = Vec<Option<Hint>>> + Send;

    /// Adds `cost` to what `subject` used in its present window of `limit`, and says whether that was too much.
    ///
    /// What is refused counts too, so that whoever goes on without a pause stays refused. A subject has at most
    /// [`SUBJECT_BYTES_MAX`] bytes; of a longer one nothing is known.
    fn charge(&self, subject: &str, cost: u32, limit: Limit) -> impl Future<Output = Charge> + Send;

    /// Stores how far conversations have come.
    fn raise_heads(&self, heads: impl IntoIterator<Item = (ConversationId, HotHead)>) {
        let hint = |(conversation, head): (_, HotHead)| {
            let hint = Hint { version: head.seq, numbers: [head.counted.cast_signed(), 0] };
            (HintKey::Head(conversation), hint, HEAD_LIFETIME)
        };
        self.raise(heads.into_iter().map(hint).collect());
    }

    /// How far conversations have come at least: an owner may have gone further.
    fn heads(&self, conversations: &[ConversationId]) -> impl Future<Output = Vec<Option<HotHead>>> + Send {
        let keys = conversations.iter().map(|conversation| HintKey::Head(*conversation)).collect();
        let head = |hint: Hint| HotHead { seq: hint.version, counted: hint.numbers[0].cast_unsigned() };
        async move { self.read(keys).await.into_iter().map(|hint| hint.map(head)).collect() }
    }

    /// Stores who is there. Of several words about a user the one that was said last stays.
    fn put_presence(&self, said_at: Timestamp, updates: impl IntoIterator<Item = (UserId, Presence)>) {
        let version = u64::try_from(said_at.as_millis()).unwrap_or(0);
        let hint = |(user, presence): (_, Presence)| {
            let (until, seen) = (presence.online_until.as_millis(), presence.last_seen.as_millis());
            let hint = Hint { version, numbers: [until, seen] };
            (HintKey::Presence(user), hint, PRESENCE_LIFETIME)
        };
        self.raise(updates.into_iter().map(hint).collect());
    }

    /// Who is there; whoever is not known may be.
    fn presence(&self, users: &[UserId]) -> impl Future<Output = Vec<Option<Presence>>> + Send {
        let keys = users.iter().cloned().map(HintKey::Presence).collect();
        let presence = |hint: Hint| Presence {
            online_until: Timestamp::from_millis(hint.numbers[0]),
            last_seen: Timestamp::from_millis(hint.numbers[1]),
        };
        async move { self.read(keys).await.into_iter().map(|hint| hint.map(presence)).collect() }
    }
}

/// The closed set of backends as one value. A clone is another handle of the same state.
#[derive(Clone, Debug)]
pub enum Hot {
    Memory(MemoryHot),
    Redis(RedisHot),
}

impl From<MemoryHot> for Hot {
    fn from(hot: MemoryHot) -> Self {
        Self::Memory(hot)
    }
}

impl From<RedisHot> for Hot {
    fn from(hot: RedisHot) -> Self {
        Self::Redis(hot)
    }
}

impl HotState for Hot {
    fn raise(&self, hints: Vec<(HintKey, Hint, Duration)>) {
        match self {
            Self::Memory(hot) => hot.raise(hints),
            Self::Redis(hot) => hot.raise(hints),
        }
    }

    async fn read(&self, keys: Vec<HintKey>) -> Vec<Option<Hint>> {
        match self {
            Self::Memory(hot) => hot.read(keys).await,
            Self::Redis(hot) => hot.read(keys).await,
        }
    }

    async fn charge(&self, subject: &str, cost: u32, limit: Limit) -> Charge {
        match self {
            Self::Memory(hot) => hot.charge(subject, cost, limit).await,
            Self::Redis(hot) => hot.charge(subject, cost, limit).await,
        }
    }
}
