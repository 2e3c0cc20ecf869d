//! Checks a fjall directory before fjall opens it.
//!
//! fjall replays its journals up to the first thing that it cannot parse and cuts the rest off, whether that is the torn tail of a
//! commit that was never synced or damage in front of commits that were acknowledged; and a torn commit whose frame is whole but
//! whose content is not makes it refuse the directory. This check tells the two apart: there is one unsynced commit at most, and it
//! is the last thing in the newest journal that holds anything. So what is broken and has an intact commit behind it is damage and an error; what is
//! broken and has none is cut off here. Files that fjall would silently create again are required.
//!
//! Follows the journal format of fjall 3 (a commit is start, items, end with a checksum of the items). The checksum does not cover the
//! seqno at the start, by which versions of a row are ordered; it is held against those of its neighbours. Not noticed: one that is
//! changed but still between them, which changes no order; and one of the very first commit that is lower than it was by less than
//! what may lie between two.

use std::{
    fs,
    io::{self, BufReader, Read},
    ops::Range,
    path::{Path, PathBuf},
};

use xxhash_rust::xxh3::Xxh3;

use super::engine::{cannot_open, restore};
use crate::model::StoreError;

const START: u8 = 1;
const ITEM: u8 = 2;
const END: u8 = 3;
const CLEAR: u8 = 4;
const TRAILER: &[u8; 4] = b"FJL\x03";

/// Checks the files that must be there and all journals; cuts off a torn tail.
pub(super) fn check_directory(path: &Path) -> Result<(), StoreError> {
    for name in ["version", "lock", "keyspaces"] {
        require(&path.join(name))?;
    }
    let keyspaces = path.join("keyspaces");
    for entry in fs::read_dir(&keyspaces).map_err(|error| cannot_open(&keyspaces, &error))? {
        let entry = entry.map_err(|error| cannot_open(&keyspaces, &error))?;
        require(&entry.path().join("current"))?;
    }
    let journals = journals(path)?;
    // A journal is begun while the disk is full, too: behind the torn commit, and without one of its own.
    let mut used = journals.len();
    while let Some(journal) = journals.get(..used).and_then(<[PathBuf]>::last)
        && used > 1
        && is_blank(journal).map_err(|error| cannot_open(journal, &error))?
    {
        used -= 1;
    }
    if used == 0 {
        return Err(restore(path, "it has no journal"));
    }
    let mut last_seqno = None;
    for (journal, number) in journals[..used].iter().zip(1..) {
        last_seqno = check_journal(journal, last_seqno, number == used)?;
    }
    Ok(())
}

/// Whether a file holds nothing but preallocated space.
fn is_blank(path: &Path) -> io::Result<bool> {
    let mut file = fs::File::open(path)?;
    let mut buffer = vec![0; 1 << 16];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(true),
            read if buffer[..read].iter().any(|byte| *byte != 0) => return Ok(false),
            _ => {}
        }
    }
}

fn require(path: &Path) -> Result<(), StoreError> {
    match path.try_exists() {
        Ok(true) => Ok(()),
        Ok(false) => Err(restore(path, "it is missing")),
        Err(error) => Err(cannot_open(path, &error)),
    }
}

/// The journals, oldest first. They are numbered, and deleted from the oldest on.
fn journals(path: &Path) -> Result<Vec<PathBuf>, StoreError> {
    let mut numbered = Vec::new();
    for entry in fs::read_dir(path).map_err(|error| cannot_open(path, &error))? {
        let file = entry.map_err(|error| cannot_open(path, &error))?.path();
        if file.extension().is_some_and(|extension| extension == "jnl") {
            let number = file.file_stem().and_then(|stem| stem.to_str()?.parse::<u64>().ok());
            numbered.push((number.ok_or_else(|| restore(&file, "a journal has a number as its name"))?, file));
        }
    }
    numbered.sort_unstable();
    if let Some(gap) = numbered.windows(2).find(|pair| pair[0].0 + 1 != pair[1].0) {
        return Err(restore(&gap[1].1, "the journal before it is missing"));
    }
    Ok(numbered.into_iter().map(|(_, file)| file).collect())
}

/// Reads a journal through; gives the last seqno, its own or the one before.
fn check_journal(path: &Path, mut last_seqno: Option<u64>, newest: bool) -> Result<Option<u64>, StoreError> {
    let io = |error: io::Error| cannot_open(path, &error);
    let file = fs::OpenOptions::new().read(true).write(true).open(path).map_err(io)?;
    let length = file.metadata().map_err(io)?.len();
    let mut reader = BufReader::with_capacity(1 << 16, &file);
    let mut valid = 0;
    while let Some((seqno, bytes)) = read_commit(&mut reader, length - valid).map_err(io)? {
        if !successors(last_seqno).contains(&seqno) {
            // No tail, be it the last: where a write was torn, the checksum behind its start does not fit.
            return Err(restore(path, &format!("the commit at byte {valid} has a seqno out of order, {seqno}")));
        }
        valid += bytes;
        last_seqno = Some(seqno);
    }
    let rest = rest_of(&file, valid).map_err(io)?;
    if rest.is_empty() {
        return Ok(last_seqno);
    }
    if !newest || holds_later_commit(&rest, last_seqno) {
        return Err(restore(path, &format!("it is damaged at byte {valid}, in front of commits that are intact")));
    }
    tracing::warn!(path = %path.display(), at = valid, "cutting off a commit that was not complete at the last stop");
    file.set_len(valid).and_then(|()| file.sync_all()).map_err(io)?;
    Ok(last_seqno)
}

/// What lies behind the last intact commit, without the zeros of preallocated space.
fn rest_of(mut file: &fs::File, valid: u64) -> io::Result<Vec<u8>> {
    use std::io::Seek;
    file.seek(io::SeekFrom::Start(valid))?;
    let mut rest = Vec::new();
    file.read_to_end(&mut rest)?;
    let length = rest.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    rest.truncate(length);
    Ok(rest)
}

/// The seqnos that a commit behind another may have. Each takes the next one, and so does each flush and compaction in between, so a
/// later commit has a greater one and is not far ahead; random bytes are.
fn successors(last_seqno: Option<u64>) -> Range<u64> {
    last_seqno.map_or(0..u64::MAX >> 16, |seqno| seqno.saturating_add(1)..seqno.saturating_add(1 << 32))
}

/// Whether a commit with a greater seqno lies behind the broken one that `rest` begins with.
fn holds_later_commit(rest: &[u8], last_seqno: Option<u64>) -> bool {
    let likely = successors(last_seqno);
    (1..rest.len()).filter(|at| rest[*at] == START).any(|at| {
        let mut candidate = &rest[at..];
        let length = candidate.len() as u64;
        let seqno = rest.get(at + 5..at + 13).and_then(|bytes| Some(u64::from_le_bytes(bytes.try_into().ok()?)));
        seqno.is_some_and(|seqno| likely.contains(&seqno))
            && matches!(rest.get(at + 13), Some(&ITEM | &CLEAR))
            && matches!(read_commit(&mut candidate, length), Ok(Some(_)))
    })
}

/// Reads one commit and gives its seqno and length, or nothing if what comes is no intact commit. `left` bounds what it may claim.
fn read_commit(reader: &mut impl Read, left: u64) -> io::Result<Option<(u64, u64)>> {
    let mut commit = Commit { reader, left, read: 0, checksum: Xxh3::new(), buffer: Vec::new() };
    match commit.read() {
        Ok(seqno) => Ok(seqno.map(|seqno| (seqno, commit.read))),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(error),
    }
}

struct Commit<'a, R> {
    reader: &'a mut R,
    left: u64,
    read: u64,
    checksum: Xxh3,
    buffer: Vec<u8>,
}

impl<R: Read> Commit<'_, R> {
    fn read(&mut self) -> io::Result<Option<u64>> {
        let [tag] = self.bytes()?;
        if tag != START {
            return Ok(None);
        }
        let items = u32::from_le_bytes(self.bytes()?);
        let seqno = u64::from_le_bytes(self.bytes()?);
        for _ in 0..items {
            if !self.item()? {
                return Ok(None);
            }
        }
        let [tag] = self.bytes()?;
        if tag != END {
            return Ok(None);
        }
        let expected = u64::from_le_bytes(self.bytes()?);
        let trailer: [u8; 4] = self.bytes()?;
        Ok((trailer == *TRAILER && expected == self.checksum.digest()).then_some(seqno))
    }

    fn item(&mut self) -> io::Result<bool> {
        let [tag] = self.bytes()?;
        self.checksum.update(&[tag]);
        match tag {
            ITEM => {
                // Kind of value, compression, keyspace, length of key, length of value, its length as stored.
                let head: [u8; 20] = self.bytes()?;
                self.checksum.update(&head);
                let [.., k0, k1, _, _, _, _, v0, v1, v2, v3] = head;
                let (key, value) = (u16::from_le_bytes([k0, k1]), u32::from_le_bytes([v0, v1, v2, v3]));
                self.content(u64::from(key) + u64::from(value))?;
                Ok(true)
            }
            CLEAR => {
                let keyspace: [u8; 8] = self.bytes()?;
                self.checksum.update(&keyspace);
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    fn content(&mut self, length: u64) -> io::Result<()> {
        self.claim(length)?;
        self.buffer.resize(usize::try_from(length).map_err(|_| io::ErrorKind::UnexpectedEof)?, 0);
        self.reader.read_exact(&mut self.buffer)?;
        self.checksum.update(&self.buffer);
        Ok(())
    }

    fn bytes<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        self.claim(N as u64)?;
        let mut bytes = [0; N];
        self.reader.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn claim(&mut self, bytes: u64) -> io::Result<()> {
        self.left = self.left.checked_sub(bytes).ok_or(io::ErrorKind::UnexpectedEof)?;
        self.read += bytes;
        Ok(())
    }
}
