//! The configuration: one typed tree, filled in this order: defaults, file, environment, options of the command line.
//!
//! Every setting is named once, in [`settings`](tree): key, reason, typed place, range. Reading, checking, printing the defaults and
//! showing what is in force all walk that list. A setting that is not in the list is refused, and all problems are reported at once.

mod cluster;
mod quantity;
mod roles;
mod setting;
mod store;
mod tree;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::{Path, PathBuf},
};

pub use cluster::ClusterConfig;
pub use quantity::parse_duration;
pub use setting::Setting;
pub use tree::{Config, LogConfig, LogFormat, Process};

/// `im`, the client, and the option `--config` use these; all other variables that begin with `IM_` name a setting.
const OTHER_VARIABLES: [&str; 5] = ["IM_SERVER", "IM_TOKEN", "IM_TOKEN_FILE", "IM_CA", "IM_CONFIG"];

/// One thing that is wrong with a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The file, variable or option; empty for what nobody set.
    pub source: String,
    pub what: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source[..] {
            "" => f.write_str(&self.what),
            source => write!(f, "{source}: {}", self.what),
        }
    }
}

/// Why a configuration cannot be used: everything that is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct ConfigError(pub Vec<Problem>);

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<_> = self.0.iter().map(ToString::to_string).collect();
        f.write_str(&lines.join("\n"))
    }
}

/// What the command line says about the configuration.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    pub file: Option<PathBuf>,
    /// Option as the user wrote it, key, value.
    pub options: Vec<(String, String, String)>,
}

/// A configuration in force, and where each value that is not a default came from.
#[derive(Debug)]
pub struct Loaded {
    pub config: Config,
    pub sources: BTreeMap<&'static str, String>,
    /// Variables that look like settings and are none. Not refused: container platforms set such names on their own account.
    pub unknown_variables: Vec<String>,
}

/// Reads file, environment and options over the defaults.
pub fn load(
    overrides: &Overrides,
    environment: &BTreeMap<String, String>,
    process: Process,
) -> Result<Loaded, ConfigError> {
    let mut loader = Loader { config: Config::of(process), ..Loader::default() };
    if let Some(file) = &overrides.file {
        loader.file(file);
    }
    loader.environment(environment);
    for (option, key, value) in &overrides.options {
        loader.set(option, key, value);
    }
    loader.finish(process)
}

/// Checks a file alone, as one of `imd up` or, if it names etcd, of both roles.
pub fn check(file: &Path) -> Result<(), ConfigError> {
    let mut loader = Loader::default();
    loader.file(file);
    let alone = loader.config.cluster.etcd_urls().is_empty();
    let processes: &[Process] = if alone { &[Process::Up] } else { &[Process::Router, Process::Gateway] };
    for process in processes {
        loader.contradictions(*process);
    }
    loader.problems.dedup();
    if loader.problems.is_empty() { Ok(()) } else { Err(ConfigError(loader.problems)) }
}

/// The defaults as a commented file that [`check`] accepts.
pub fn defaults() -> String {
    let mut text = String::from(
        "# Defaults of imd. A setting can also be given by the environment variable named with it, or by --set KEY=VALUE.\n\
         # Later ones win: this file, the environment, the command line.\n",
    );
    print(&mut Config::default(), |setting| {
        let mut lines: Vec<_> = setting.comment.lines().map(|line| format!("# {line}")).collect();
        lines.push(format!("# {}. {}", capitalised(&setting.expected()), setting.variable()));
        lines
    })
    .into_iter()
    .for_each(|block| text.push_str(&block));
    text
}

/// The configuration in force as a file, with the source of each value that is not a default.
pub fn show(loaded: &mut Loaded) -> String {
    let sources = &loaded.sources;
    print(&mut loaded.config, |setting| {
        sources.get(setting.key).map(|source| format!("# from {source}")).into_iter().collect()
    })
    .concat()
}

/// One block of text a setting, the comment above it, tables before their first setting.
fn print(config: &mut Config, comment: impl Fn(&Setting<'_>) -> Vec<String>) -> Vec<String> {
    let mut table = "";
    let mut blocks = Vec::new();
    for setting in config.settings() {
        let mut lines = comment(&setting);
        if !lines.is_empty() {
            lines.insert(0, String::new());
        }
        let (setting_table, name) = setting.key.rsplit_once('.').unwrap_or(("", setting.key));
        if setting_table != table {
            table = setting_table;
            blocks.push(format!("\n[{table}]\n"));
        }
        lines.push(format!("{name} = {}", setting.toml_value()));
        blocks.push(lines.join("\n") + "\n");
    }
    blocks
}

fn capitalised(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map(|first| first.to_uppercase().chain(chars).collect()).unwrap_or_default()
}

#[derive(Default)]
struct Loader {
    config: Config,
    sources: BTreeMap<&'static str, String>,
    problems: Vec<Problem>,
    /// Settings whose value was none: nothing more is said of them.
    refused: BTreeSet<&'static str>,
    unknown_variables: Vec<String>,
}

impl Loader {
    fn problem(&mut self, source: &str, what: String) {
        self.problems.push(Problem { source: source.to_owned(), what });
    }

    fn set(&mut self, source: &str, key: &str, text: &str) {
        let mut settings = self.config.settings();
        let Some(setting) = settings.iter_mut().find(|setting| setting.key == key) else {
            return self.problem(source, format!("there is no setting {key}; `imd config defaults` lists them"));
        };
        if setting.set(text) {
            let key = setting.key;
            self.sources.insert(key, source.to_owned());
        } else {
            let what = format!("{key} = {text:?}: expected {}", setting.expected());
            self.refused.insert(setting.key);
            self.problem(source, what);
        }
    }

    fn file(&mut self, path: &Path) {
        let source = path.display().to_string();
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) => return self.problem(&source, format!("cannot be read: {error}")),
        };
        match text.parse::<toml::Table>() {
            Ok(table) => self.table(&source, "", &table),
            Err(error) => {
                let line = error.span().map_or(1, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
                self.problem(&source, format!("line {line}: {}", error.message()));
            }
        }
    }

    fn table(&mut self, source: &str, prefix: &str, table: &toml::Table) {
        for (name, value) in table {
            let key = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
            match value {
                toml::Value::Table(inner) => self.table(source, &key, inner),
                toml::Value::String(text) => self.set(source, &key, text),
                toml::Value::Integer(number) => self.set(source, &key, &number.to_string()),
                other => self.set(source, &key, &other.to_string()),
            }
        }
    }

    fn environment(&mut self, environment: &BTreeMap<String, String>) {
        let keys: BTreeMap<String, &'static str> =
            self.config.settings().iter().map(|setting| (setting.variable(), setting.key)).collect();
        for (variable, value) in environment {
            if let Some(key) = keys.get(variable) {
                self.set(variable, key, value);
            } else if variable.starts_with("IM_") && !OTHER_VARIABLES.contains(&variable.as_str()) {
                self.unknown_variables.push(variable.clone());
            }
        }
    }

    fn contradictions(&mut self, process: Process) {
        let found = self.config.contradictions(process);
        for (key, what) in found.into_iter().filter(|(key, _)| !self.refused.contains(key)).collect::<Vec<_>>() {
            let is_unset = |setting: &Setting<'_>| setting.key == key && setting.slot.to_string().is_empty();
            let source = match self.sources.get(key) {
                Some(source) => source.clone(),
                None if self.config.settings().iter().any(is_unset) => String::new(),
                None => "default".to_owned(),
            };
            self.problem(&source, what);
        }
    }

    fn finish(mut self, process: Process) -> Result<Loaded, ConfigError> {
        self.contradictions(process);
        if !self.problems.is_empty() {
            return Err(ConfigError(self.problems));
        }
        let Loader { config, sources, unknown_variables, .. } = self;
        Ok(Loaded { config, sources, unknown_variables })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn file(text: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        file
    }

    fn problems(text: &str) -> Vec<String> {
        match check(file(text).path()) {
            Ok(()) => Vec::new(),
            Err(ConfigError(problems)) => problems.into_iter().map(|problem| problem.what).collect(),
        }
    }

    #[test]
    fn the_printed_defaults_are_accepted_and_change_nothing() {
        let text = defaults();
        assert_eq!(problems(&text), Vec::<String>::new());
        let overrides = Overrides { file: Some(file(&text).path().to_owned()), options: Vec::new() };
        // The file is gone by now, so it is reported: a missing file is a problem, not a silent default.
        assert!(load(&overrides, &BTreeMap::new(), Process::Up).is_err());
        let kept = file(&text);
        let overrides = Overrides { file: Some(kept.path().to_owned()), options: Vec::new() };
        let mut loaded = load(&overrides, &BTreeMap::new(), Process::Up).unwrap();
        let mut untouched = Config::default();
        for (one, other) in loaded.config.settings().iter().zip(untouched.settings()) {
            assert_eq!(one.toml_value(), other.toml_value(), "{}", one.key);
        }
    }

    #[test]
    fn every_setting_explains_itself_and_its_default_keeps_its_own_range() {
        for mut setting in Config::default().settings() {
            assert!(setting.comment.len() > 20, "{} has no reason", setting.key);
            let text = setting.slot.to_string();
            assert!(setting.set(&text), "{} = {text}", setting.key);
        }
    }

    #[test]
    fn no_frame_may_be_so_long_that_a_link_cannot_carry_it() {
        let found = problems("[gateway]\nframe_bytes_max = \"16MiB\"");
        let expected = "gateway.frame_bytes_max = \"16MiB\": expected a size from 128KiB to 8MiB";
        assert!(found.len() == 1 && found[0].contains(expected), "{found:#?}");
    }

    #[test]
    fn all_problems_are_reported_at_once_with_key_value_and_range() {
        let found = problems(
            "tcp = \"nowhere\"\ndrain_timeout = 5\ncolour = \"red\"\n[router]\nworkers = 100000\n[tables]\n[log]\nformat = \"xml\"",
        );
        assert_eq!(found.len(), 5, "{found:#?}");
        for part in [
            "tcp = \"nowhere\": expected an address",
            "drain_timeout = \"5\": expected a duration from 1s to 10m",
            "there is no setting colour",
            "router.workers = \"100000\": expected a whole number from 0 to 256",
            "log.format = \"xml\": expected one of text, json",
        ] {
            assert!(found.iter().any(|problem| problem.contains(part)), "{part} is missing in {found:#?}");
        }
    }

    #[test]
    fn broken_toml_names_the_line() {
        let found = problems("tcp = \"127.0.0.1:1\"\nthis is not toml\n");
        assert!(found[0].starts_with("line 2:"), "{found:?}");
    }

    #[test]
    fn plaintext_beyond_loopback_must_be_asked_for() {
        assert!(problems("tcp = \"0.0.0.0:7100\"")[0].contains("plaintext"));
        assert_eq!(problems("tcp = \"0.0.0.0:7100\"\nplaintext = \"anywhere\""), Vec::<String>::new());
        assert_eq!(problems("tls = \"0.0.0.0:7101\"\nquic = \"[::]:7101\""), Vec::<String>::new());
    }

    #[test]
    fn options_win_over_the_environment_and_that_over_the_file() {
        let kept = file("tcp = \"127.0.0.1:1\"\ntls = \"127.0.0.1:2\"\ndrain_timeout = \"3s\"");
        let overrides = Overrides {
            file: Some(kept.path().to_owned()),
            options: vec![("--tcp".to_owned(), "tcp".to_owned(), "localhost:5".to_owned())],
        };
        let variables = [("IM_TCP", "127.0.0.1:3"), ("IM_TLS", "off"), ("IM_SERVER", "x"), ("IM_X", "y")];
        let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        let mut loaded = load(&overrides, &variables, Process::Up).unwrap();
        assert_eq!(loaded.config.tcp, Some("127.0.0.1:5".parse().unwrap()));
        assert_eq!(loaded.config.tls, None);
        assert_eq!(loaded.config.drain_timeout, Duration::from_secs(3));
        assert_eq!(loaded.sources["tls"], "IM_TLS");
        assert_eq!(loaded.unknown_variables, ["IM_X"]);
        assert!(show(&mut loaded).contains("# from --tcp\ntcp = \"127.0.0.1:5\""));
    }
}
