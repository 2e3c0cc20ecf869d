//! What packages of `im` and `imd` install beside them, made from the command line's own definition: completions and manual pages.

use std::path::Path;

use clap_complete::Shell;

/// The script of a shell, for a program with this command line.
pub fn completions(mut command: clap::Command, shell: Shell) -> String {
    let (mut script, name) = (Vec::new(), command.get_name().to_owned());
    clap_complete::generate(shell, &mut command, name, &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

/// A page for each command, in a directory. What went wrong, in words.
pub fn man(command: clap::Command, directory: &Path) -> Result<(), String> {
    let written = std::fs::create_dir_all(directory).and_then(|()| clap_mangen::generate_to(command, directory));
    written.map_err(|error| format!("cannot write manual pages to {}: {error}", directory.display()))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;
    use crate::terminal::args::Arguments;

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
        commands(&command, "im", &mut found);
        found
    }

    #[test]
    fn every_command_and_option_is_completed_in_each_shell() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let script = completions(Arguments::command(), shell);
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
        man(Arguments::command(), &pages).unwrap();
        let all = all();
        assert!(all.len() > 12, "{all:?}");
        for (path, options) in all {
            let page = std::fs::read_to_string(pages.join(format!("{path}.1"))).expect(&path);
            for option in options {
                assert!(page.contains(&option.replace('-', "\\-")), "{path} --{option}");
            }
        }
    }
}
