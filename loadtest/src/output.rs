//! Where a report goes: standard output always, and the files of `--json` and `--html`, which are tried before the run.
//!
//! A trial leaves nothing behind: what is there keeps its content until the report is, and what is not there is not made before.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    path::Path,
};

use crate::{options::Common, usage::usage};

/// Whether the files can be written, as far as that can be known before.
pub fn check(options: &Common) -> anyhow::Result<()> {
    if options.json.is_some() && options.json == options.html {
        return Err(usage("--json and --html name the same file"));
    }
    for (option, path) in [("--json", &options.json), ("--html", &options.html)] {
        let Some(path) = path else { continue };
        try_to_write(path).map_err(|error| usage(format!("{option} {}: {error}", path.display())))?;
    }
    Ok(())
}

fn try_to_write(path: &Path) -> io::Result<()> {
    match path.metadata() {
        // Who reads from a pipe would wait for the report no longer.
        Ok(there) if !there.is_file() && !there.is_dir() => Ok(()),
        Ok(_) => OpenOptions::new().write(true).open(path).map(drop),
        Err(_) if path.is_symlink() => Err(io::Error::other("this link leads nowhere")),
        Err(_) => {
            drop(File::create_new(path)?);
            std::fs::remove_file(path)
        }
    }
}

/// Writes the report everywhere; whether all of it was written. What fails is said and keeps nothing else from being written.
pub fn write(options: &Common, text: &str, page: impl FnOnce() -> String) -> bool {
    let mut stdout = io::stdout().lock();
    let printed = writeln!(stdout, "{text}").and_then(|()| stdout.flush());
    // A closed pipe is no failure: whoever reads has seen enough.
    let printed = printed.or_else(|error| if error.kind() == io::ErrorKind::BrokenPipe { Ok(()) } else { Err(error) });
    let json = options.json.as_deref().map_or(Ok(()), |path| std::fs::write(path, text));
    let html = options.html.as_deref().map_or(Ok(()), |path| std::fs::write(path, page()));
    let mut complete = true;
    let named = |option: &str, path: &Option<std::path::PathBuf>| {
        format!("{option} {}", path.as_deref().unwrap_or(Path::new("")).display())
    };
    for (what, written) in [
        ("standard output".to_owned(), printed),
        (named("--json", &options.json), json),
        (named("--html", &options.html), html),
    ] {
        if let Err(error) = written {
            complete = false;
            let _ = writeln!(io::stderr(), "loadtest: {what}: {error}");
        }
    }
    complete
}
