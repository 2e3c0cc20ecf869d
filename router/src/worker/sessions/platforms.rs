//! The names of platforms, each once: sessions share the text of theirs.

use im_proto::Platform;

/// Names that are kept; there are a handful.
const PLATFORMS_MAX: usize = 16;

/// The names that were met first.
#[derive(Default)]
pub struct Platforms(Vec<Platform>);

impl Platforms {
    /// The same name, shared with sessions that have it too.
    pub fn shared(&mut self, platform: Platform) -> Platform {
        if let Some(known) = self.0.iter().find(|known| **known == platform) {
            return known.clone();
        }
        if self.0.len() < PLATFORMS_MAX {
            self.0.push(platform.clone());
        }
        platform
    }
}
