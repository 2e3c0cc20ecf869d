//! Files that appear whole or not at all, and are on disk when the call returns.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::Path,
};

use serde::{Serialize, de::DeserializeOwned};

use super::DataError;

/// Who may read a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Owner,
    Everybody,
}

/// For `map_err`.
pub fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DataError {
    let path = path.to_owned();
    move |source| DataError::Io { action, path, source }
}

/// Creates a directory for its owner only, with all above it; one that is there stays as it is.
pub fn create_directory(path: &Path) -> Result<(), DataError> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed("create", path))
}

/// Replaces a file by way of a temporary one beside it, synced before and after the rename.
pub fn write(path: &Path, bytes: &[u8], access: Access) -> Result<(), DataError> {
    let fail = |error| failed("write", path)(error);
    let folder = path.parent().unwrap_or(Path::new("."));
    create_directory(folder)?;
    let temporary = path.with_extension("new");
    let mode = if access == Access::Owner { 0o600 } else { 0o644 };
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&temporary).map_err(fail)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(fail)?;
    fs::rename(&temporary, path).map_err(fail)?;
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(fail)
}

/// [`write`] of a value as JSON.
pub fn write_json(path: &Path, value: &impl Serialize, access: Access) -> Result<(), DataError> {
    let mut text = serde_json::to_vec_pretty(value).map_err(|error| failed("write", path)(error.into()))?;
    text.push(b'\n');
    write(path, &text, access)
}

/// The bytes of a file, or `None` if there is none.
pub fn read_bytes_if_there(path: &Path) -> Result<Option<Vec<u8>>, DataError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed("read", path)(error)),
    }
}

/// The text of a file, or `None` if there is none.
pub fn read_if_there(path: &Path) -> Result<Option<String>, DataError> {
    let Some(bytes) = read_bytes_if_there(path)? else { return Ok(None) };
    String::from_utf8(bytes).map(Some).map_err(|_| damaged(path, "it is no text"))
}

/// The value in a JSON file, or `None` if there is none.
pub fn read_json_if_there<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, DataError> {
    let Some(bytes) = read_bytes_if_there(path)? else { return Ok(None) };
    serde_json::from_slice(&bytes).map(Some).map_err(|error| damaged(path, error))
}

/// Removes a file that may be gone already.
pub fn remove_if_there(path: &Path) -> Result<(), DataError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Removes a file, and it is gone from the disk when this returns.
pub fn remove(path: &Path) -> Result<(), DataError> {
    remove_if_there(path)?;
    let folder = path.parent().unwrap_or(Path::new("."));
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed("remove", path))
}

/// The file is there and does not hold what it should.
pub fn damaged(path: &Path, reason: impl ToString) -> DataError {
    DataError::Damaged { path: path.to_owned(), reason: reason.to_string() }
}
