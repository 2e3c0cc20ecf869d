//! Rules of style that no lint knows. CONTRIBUTING.md has them for people.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// Lines of a file without its tests.
const LINES_MAX: usize = 500;

/// Files that are longer, with the length that they may not pass. Take a line out when its file has become short enough.
const LONGER: [(&str, usize); 0] = [];

/// Roles that run unchanged inside the simulation.
const SIMULATED: [&str; 2] = ["gateway/src", "router/src"];

struct Source {
    /// Relative to the workspace.
    name: String,
    text: String,
}

fn folder(path: &Path, extension: &str, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(path).expect("a folder of the workspace") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if path.is_dir() {
            if !["target", "data", "corpus", "artifacts", "coverage"].contains(&name) && !name.starts_with('.') {
                folder(&path, extension, found);
            }
        } else if path.extension().is_some_and(|found| found == extension) {
            found.push(path);
        }
    }
}

fn sources(extension: &str) -> Vec<Source> {
    let root = crate::workspace();
    let mut paths = Vec::new();
    folder(&root, extension, &mut paths);
    paths.sort();
    paths
        .into_iter()
        .map(|path| Source {
            name: path.strip_prefix(&root).expect("inside").display().to_string(),
            text: fs::read_to_string(&path).expect("a text"),
        })
        .collect()
}

/// The lines before the unit tests, which stand at the end: here, or in a file of their own.
fn without_tests(text: &str) -> impl Iterator<Item = &str> {
    before_tests(text).0.lines()
}

/// What stands before the tests at the end of a file, and the tests. Others of the crate may use what they have.
fn before_tests(text: &str) -> (&str, Option<&str>) {
    ["\n#[cfg(test)]\nmod tests", "\n#[cfg(test)]\npub(crate) mod tests"]
        .iter()
        .find_map(|start| text.split_once(start))
        .map_or((text, None), |(before, tests)| (before, Some(tests)))
}

/// Name and text of every source of the programs, without tests.
pub fn programs() -> Vec<(String, String)> {
    let programs =
        sources("rs").into_iter().filter(|source| source.name.contains("/src/") && !holds_tests_alone(&source.name));
    programs.map(|source| (source.name, without_tests(&source.text).collect::<Vec<_>>().join("\n"))).collect()
}

fn holds_tests_alone(name: &str) -> bool {
    name.contains("/tests/") || name.ends_with("/tests.rs")
}

#[test]
fn files_are_short() {
    for source in sources("rs") {
        // Tests of their own and generated tables are read from top to bottom, not kept in mind.
        if holds_tests_alone(&source.name) {
            continue;
        }
        let lines = without_tests(&source.text).count();
        let exception = LONGER.iter().find(|(name, _)| *name == source.name);
        match exception {
            None => assert!(lines <= LINES_MAX, "{} has {lines} lines: split it", source.name),
            Some((name, most)) => {
                assert!(lines <= *most, "{name} grew from {most} to {lines} lines: split it");
                assert!(lines > LINES_MAX, "{name} is short enough now: take it out of the list");
            }
        }
    }
}

#[test]
fn modules_are_named_after_what_they_hold() {
    for source in sources("rs") {
        let file = Path::new(&source.name).file_name().and_then(|name| name.to_str()).unwrap_or_default();
        for banned in ["mod.rs", "util.rs", "utils.rs", "common.rs", "helpers.rs", "misc.rs"] {
            assert_ne!(file, banned, "{}", source.name);
        }
    }
}

#[test]
fn nothing_is_left_to_do() {
    // Spelt in two parts, so that this file does not find itself.
    let banned =
        ["to".to_owned() + "do!(", "unimple".to_owned() + "mented!(", "FIX".to_owned() + "ME", "TO".to_owned() + "DO"];
    for source in sources("rs").into_iter().chain(sources("proto")).chain(sources("sh")) {
        for word in &banned {
            assert!(!source.text.contains(word.as_str()), "{} holds {word}", source.name);
        }
    }
}

#[test]
fn gateway_and_router_behave_in_a_simulation_as_they_do_outside() {
    for source in sources("rs") {
        if !SIMULATED.iter().any(|folder| source.name.starts_with(folder)) || holds_tests_alone(&source.name) {
            continue;
        }
        for line in without_tests(&source.text) {
            let switches = line.contains("cfg(") || line.contains("cfg!(") || line.contains("cfg_attr(");
            let lints = line.starts_with("#![cfg_attr(test, allow(");
            assert!(!switches || lints, "{}: {line}", source.name);
            assert!(
                !line.to_lowercase().contains("simulat") || line.trim_start().starts_with("//"),
                "{}: {line}",
                source.name
            );
        }
        if let (_, Some(tests)) = before_tests(&source.text) {
            let after = tests.trim_end().strip_suffix("\n}").unwrap_or(tests.trim_end());
            let inside = |line: &str| line.is_empty() || line == ";" || line == " {" || line.starts_with(' ');
            assert!(after.lines().all(inside), "{}: something follows the tests", source.name);
        }
    }
}

/// docs/adr/0007-no-unsafe-little-c.md says what for.
const UNSAFE: [&str; 1] = ["storage/tests/files.rs"];

#[test]
fn unsafe_code_stands_only_in_one_file_of_tests() {
    // Spelt in two parts, so that this file does not find itself.
    let (word, lint) = ("uns".to_owned() + "afe", "uns".to_owned() + "afe_code");
    let is_used = |line: &str| {
        let code = line.split("//").next().unwrap_or_default().replace(&lint, "");
        [" {", "(", " fn", " impl"].iter().any(|after| code.contains(&format!("{word}{after}")))
    };
    let found: Vec<String> = sources("rs")
        .into_iter()
        .filter(|source| source.text.contains(&format!("allow({lint}")) || source.text.lines().any(is_used))
        .map(|source| source.name)
        .collect();
    assert_eq!(found, UNSAFE, "docs/adr/0007-no-unsafe-little-c.md");
}

#[test]
fn tests_that_documents_name_exist() {
    let rust = sources("rs");
    for document in sources("md") {
        for quoted in document.text.split('`').skip(1).step_by(2) {
            // Names of tests are sentences. `…` stands for the beginning of one.
            let name = quoted.trim_start_matches('…');
            let is_sentence =
                name.matches('_').count() >= 3 && name.chars().all(|c| c == '_' || c.is_ascii_alphanumeric());
            if !is_sentence || name.starts_with("im_") || name.chars().any(|c| c.is_ascii_uppercase()) {
                continue;
            }
            // Elsewhere the names of settings look alike.
            let wanted = match document.name.as_str() {
                "docs/reliability.md" if name == quoted => format!("fn {name}("),
                "docs/reliability.md" => format!("{name}("),
                _ => name.to_owned(),
            };
            let exists = rust.iter().any(|source| source.text.contains(&wanted));
            assert!(exists, "{} names {name}, which is nowhere", document.name);
        }
    }
}

#[test]
fn links_between_documents_lead_somewhere() {
    let root = crate::workspace();
    for source in sources("md") {
        let folder = root.join(&source.name).parent().expect("a folder").to_owned();
        for target in source.text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let path = target.split('#').next().unwrap_or_default();
            if path.is_empty() || path.contains("://") {
                continue;
            }
            assert!(folder.join(path).exists(), "{}: {target} leads nowhere", source.name);
        }
    }
}
