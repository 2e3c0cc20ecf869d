//! Texts that become secrets and ids.
#![no_main]

use im_proto::{
    ConversationId, UserId,
    key::{ClusterSecret, parse_secret},
    limits,
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(id) = ConversationId::from_slice(data) {
        assert_eq!(id.to_string().parse(), Ok(id));
    }
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(id) = text.parse::<ConversationId>() {
        assert_eq!(id.to_string(), text.to_ascii_lowercase());
    }
    if let Ok(secret) = parse_secret(text) {
        let digits: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(digits, text.trim().to_ascii_lowercase());
    }
    if let Ok(user) = UserId::parse(text) {
        assert!((1..=limits::ID_BYTES_MAX).contains(&text.len()));
        let secret = ClusterSecret::new([1; 32]);
        assert_eq!(secret.direct_id(&user, &user), secret.self_id(&user));
    }
});
