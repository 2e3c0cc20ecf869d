//! Limits of the protocol, each written once. SPEC.md lists them.

/// User, device, platform and instance ids.
pub const ID_BYTES_MAX: usize = 64;
/// `client_message_id` and the key of a group.
pub const CLIENT_MESSAGE_ID_BYTES_MAX: usize = 64;
/// An encoded `Body`. Larger content is media.
pub const BODY_BYTES_MAX: usize = 64 * 1024;
/// A frame from a client that is not authenticated yet, without its length prefix.
pub const FRAME_BYTES_MAX_BEFORE_HELLO: usize = 64 * 1024;
/// A frame of an authenticated connection, without its length prefix.
pub const FRAME_BYTES_MAX: usize = 1024 * 1024;
/// Un-acknowledged sends of a session.
pub const PENDING_SENDS_MAX: usize = 256;
/// Calls in flight on a connection.
pub const CALLS_IN_FLIGHT_MAX: usize = 16;
/// The payload of one `Reply` frame.
pub const REPLY_PART_BYTES_MAX: usize = 64 * 1024;
/// Entries of a partition of the message log.
pub const BUCKET_ENTRIES: u64 = 1024;
/// Rows of one batch of the message log.
pub const BATCH_ROWS_MAX: usize = 128;
/// Bytes of one batch of the message log.
pub const BATCH_BYTES_MAX: usize = 512 * 1024;
/// Entries of one history answer.
pub const HISTORY_ENTRIES_MAX: u32 = 1_000;
/// Conversations of one page of a sync.
pub const SYNC_CONVERSATIONS_MAX: u32 = 500;
/// Entries that an owner scans for a repeat of a message before it answers `sync first`.
pub const DEDUPE_SCAN_ENTRIES_MAX: u64 = 65_536;
/// Newest entries that an owner remembers for idempotency.
pub const DEDUPE_ENTRIES: usize = 1_024;
/// Members of a group named in one call.
pub const MEMBERS_PER_CALL_MAX: usize = 1_000;
/// The name of a group.
pub const GROUP_NAME_BYTES_MAX: usize = 256;
