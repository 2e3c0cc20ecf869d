//! What packages of `imd` install beside it, made from the command line's own definition: completions and manual pages.

use std::path::Path;

use clap::CommandFactory as _;
use clap_complete::Shell;

use crate::{args::Arguments, failure::Failure};

/// The script of a shell.
pub fn completions(shell: Shell) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "imd", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

/// A page for each command, in a directory.
pub fn man(directory: &Path) -> Result<(), Failure> {
    let written =
        std::fs::create_dir_all(directory).and_then(|()| clap_mangen::generate_to(Arguments::command(), directory));
    written
        .map_err(|error| Failure::Operation(format!("cannot write manual pages to {}: {error}", directory.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The path of each command and its options.
    fn commands(command: &clap::Command, path: &str, found: &mut Vec<(String, Vec<String>)>) {
        let options = command.get_arguments().filter_map(|argument| argument.get_long()).map(str::to_owned).collect();
        found.push((path.to_owned(), options));
        for inner in command.get_subcommands().filter(|inner| inner.get_name() != "help") {
            commands(inner, &format!("{path}-{}", inner.get_name()), found);
        }
    }

    fn all() -> Vec<(String, Vec<String>)> {
        let mut found = Vec::new();
        let mut command = Arguments::command();
        command.build();
        commands(&command, "imd", &mut found);
        found
    }

    #[test]
    fn every_command_and_option_is_completed_in_each_shell() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let script = completions(shell);
            for (path, options) in all() {
                let name = path.rsplit('-').next().unwrap_or_default();
                assert!(script.contains(name), "{shell}: {path}");
                for option in options {
                    assert!(script.contains(&option), "{shell}: {path} --{option}");
                }
            }
        }
    }

    #[test]
    fn every_command_has_a_page_with_its_options() {
        let folder = tempfile::tempdir().unwrap();
        let pages = folder.path().join("man1");
        man(&pages).unwrap();
        let all = all();
        assert!(all.len() > 20, "{all:?}");
        for (path, options) in all {
            let page = std::fs::read_to_string(pages.join(format!("{path}.1"))).expect(&path);
            for option in options {
                assert!(page.contains(&option.replace('-', "\\-")), "{path} --{option}");
            }
        }
    }
}
