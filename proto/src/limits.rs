//! Limits of the protocol, each written once. SPEC.md lists them.

macro_rules! limits {
    ($($(#[doc = $doc:literal])* $name:ident: $type:ty = $value:expr;)*) => {
        $($(#[doc = $doc])* pub const $name: $type = $value;)*

        /// Name, value and meaning of all limits, in the order of the source.
        pub const ALL: &[(&str, u64, &str)] = &[$((stringify!($name), $name as u64, concat!($($doc),*))),*];
    };
}

limits! {
    /// User, device, platform and instance ids.
    ID_BYTES_MAX: usize = 64;
    /// `client_message_id` and the key of a group or channel.
    CLIENT_MESSAGE_ID_BYTES_MAX: usize = 64;
    /// An encoded `Body`. A longer text is sent in parts.
    BODY_BYTES_MAX: usize = 64 * 1024;
    /// Bodies inside a body: what an edit or a forward bundle holds, counted in depth.
    BODY_NESTING_MAX: usize = 4;
    /// Mentions of one text.
    MENTIONS_MAX: usize = 256;
    /// The emoji of a reaction or a sticker: one cluster with all its modifiers.
    EMOJI_BYTES_MAX: usize = 64;
    /// The type of a custom body.
    CUSTOM_TYPE_BYTES_MAX: usize = 128;
    /// A token in its compact form.
    TOKEN_BYTES_MAX: usize = 4 * 1024;
    /// The echo of a ping.
    PING_ECHO_BYTES_MAX: usize = 256;
    /// The name and the version that a client gives in its `Hello`, each.
    CLIENT_TEXT_BYTES_MAX: usize = 128;
    /// The first pause before a client reconnects, in milliseconds, as a server without other settings names it.
    RECONNECT_BASE_MS: u32 = 100;
    /// The longest pause before a client reconnects, in milliseconds, as a server without other settings names it.
    RECONNECT_MAX_MS: u32 = 10_000;
    /// A frame from a client that is not authenticated yet, without its length prefix.
    FRAME_BYTES_MAX_BEFORE_HELLO: usize = 64 * 1024;
    /// A frame of an authenticated connection, without its length prefix.
    FRAME_BYTES_MAX: usize = 1024 * 1024;
    /// Un-acknowledged sends of a session.
    PENDING_SENDS_MAX: usize = 256;
    /// Calls in flight on a connection.
    CALLS_IN_FLIGHT_MAX: usize = 16;
    /// The payload of one `Reply` frame.
    REPLY_PART_BYTES_MAX: usize = 64 * 1024;
    /// Entries of a partition of the message log.
    BUCKET_ENTRIES: u64 = 1024;
    /// Rows of one batch of the message log.
    BATCH_ROWS_MAX: usize = 128;
    /// Bytes of one batch of the message log.
    BATCH_BYTES_MAX: usize = 512 * 1024;
    /// Entries of one history answer.
    HISTORY_ENTRIES_MAX: u32 = 1_000;
    /// Conversations of one page of a sync.
    SYNC_CONVERSATIONS_MAX: u32 = 500;
    /// Conversations that a client names in one sync.
    SYNC_HAVE_MAX: usize = 10_000;
    /// Entries that an owner scans for a repeat of a message before it answers `sync first`.
    DEDUPE_SCAN_ENTRIES_MAX: u64 = 65_536;
    /// Newest entries that an owner remembers for idempotency.
    DEDUPE_ENTRIES: usize = 1_024;
    /// Devices of a user that are kept; beyond it the one that was seen longest ago is forgotten.
    DEVICES_MAX: usize = 128;
    /// Users whose presence is read in one call.
    PRESENCE_USERS_MAX: usize = 32;
    /// Users whose presence one session subscribes to.
    PRESENCE_WATCHED_MAX: usize = 128;
    /// Members of a group named in one call.
    MEMBERS_PER_CALL_MAX: usize = 1_000;
    /// The name of a group or channel.
    GROUP_NAME_BYTES_MAX: usize = 256;
    /// Members of a group.
    GROUP_MEMBERS_MAX: usize = 100_000;
    /// Who may write into a channel.
    CHANNEL_WRITERS_MAX: usize = 256;
    /// Conversations that are or were in a user's list, up to which the user may subscribe to one more channel.
    SUBSCRIBE_LIST_MAX: usize = 16_384;
    /// Members up to which a conversation's entries are sent to each by name; beyond it routers register.
    LARGE_MEMBERS: usize = 256;
    /// The body of a preview in a conversation list; a longer one is left out there.
    PREVIEW_BODY_BYTES_MAX: usize = 2 * 1024;
    /// Unread mentions by name that are counted in one conversation: this number means as many or more.
    MENTIONS_COUNTED_MAX: usize = 1_000;
    /// Seqs of unread mentions that a row of a conversation list names.
    MENTIONED_SEQS_MAX: usize = 16;
    /// Members up to which a conversation has receipts that the others see.
    RECEIPT_MEMBERS_MAX: usize = 64;
    /// The content of a signal: type and data of an application's own.
    SIGNAL_BYTES_MAX: usize = 4 * 1024;
    /// Signals of one user to one conversation in one second; what is over is dropped.
    SIGNALS_PER_SECOND_MAX: u32 = 5;
}
