//! From a file into a store.

use std::{path::Path, sync::Arc};

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use im_proto::{ConversationId, Epoch};
use tokio::sync::mpsc;

use super::{
    ClusterFacts, Progress, Step, Totals, TransferError,
    format::{Frame, Header, Reader, Rows, State, format_error},
    walk::patiently,
};
use crate::{
    ClusterRow, Directory as _, Inventory as _, MessageLog as _, Store,
    cluster::ImportRow,
    model::{AppendRequest, Batch, StateWrite, StoreError, Table},
};

/// The timestamp of imported entries: below every epoch.
const IMPORT_EPOCH: Epoch = Epoch(1);
/// Frames, and bytes of the file, that are written before the import is marked as that far.
const WINDOW_FRAMES: usize = 1_024;
const WINDOW_BYTES: u64 = 32 * 1024 * 1024;
/// Frames that are written at a time.
const AT_ONCE: usize = 64;

/// What came of an import.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Imported {
    pub facts: ClusterFacts,
    pub totals: Totals,
}

/// What a file says of its cluster.
pub fn read_header(file: &Path) -> Result<ClusterFacts, TransferError> {
    let mut reader = Reader::open(file)?;
    let header = header(&mut reader)?;
    header.facts().ok_or_else(|| reader.damaged("the header is not complete"))
}

/// Writes everything of a file into a store that was never used, or goes on with an import of the same file. When it returns, the store
/// belongs to the cluster of the file; until then no router starts on it. Uses blocking file operations: for tools.
pub async fn import(
    store: &Store,
    file: &Path,
    mut progress: impl FnMut(Progress<'_>),
) -> Result<Imported, TransferError> {
    let expected = check(file, &mut progress)?;
    let mut reader = Reader::open(file)?;
    let header = header(&mut reader)?;
    let facts = header.facts().ok_or_else(|| reader.damaged("the header is not complete"))?;
    let cluster = facts.row().ok_or_else(|| reader.damaged("the number of shards is none"))?;
    let state = begin(store, &cluster, &header).await?;
    let imported = Imported { facts, totals: expected };
    if state.complete {
        return Ok(imported);
    }
    let mut totals = Totals::default();
    let mut importer = Importer { store, export_id: header.export_id, frames: 0, done: state.frames };
    loop {
        let (window, ended) = Window::read(&mut reader, &mut totals)?;
        let step = if window.state.is_empty() { Step::Messages } else { Step::State };
        importer.write(window).await?;
        let permille = u32::try_from(reader.position * 1_000 / reader.length.max(1)).unwrap_or(1_000);
        progress(Progress { step, permille, totals: &totals });
        if ended {
            break;
        }
    }
    if totals != imported.totals {
        return Err(TransferError::Differs);
    }
    // The cluster row last: together with the mark it lets routers in.
    match ClusterRow::read(store).await? {
        Some(_) => {}
        None => patiently(|| cluster.write(store)).await?,
    }
    importer.mark(true).await?;
    Ok(imported)
}

/// Reads the whole file, and what it says at its end.
fn check(file: &Path, progress: &mut impl FnMut(Progress<'_>)) -> Result<Totals, TransferError> {
    let mut reader = Reader::open(file)?;
    header(&mut reader)?;
    let (mut totals, mut shown) = (Totals::default(), 0);
    loop {
        match reader.next()? {
            Some(Frame::Rows(rows)) => totals.add_rows(&rows),
            Some(Frame::State(state)) => totals.add_state(&state),
            Some(Frame::Mark(_)) => {}
            Some(Frame::Header(_)) => return Err(reader.damaged("there is a second header")),
            Some(Frame::End(end)) if end == totals && reader.position == reader.length => return Ok(end),
            Some(Frame::End(_)) => return Err(reader.damaged("the file is not what its end says")),
            None => return Err(format_error(file, "the export is not complete: run `imd export` again")),
        }
        let permille = u32::try_from(reader.position * 1_000 / reader.length.max(1)).unwrap_or(1_000);
        if permille > shown {
            shown = permille;
            progress(Progress { step: Step::Checking, permille, totals: &totals });
        }
    }
}

fn header(reader: &mut Reader) -> Result<Header, TransferError> {
    match reader.next()? {
        Some(Frame::Header(header)) => Ok(header),
        _ => Err(reader.damaged("there is no header")),
    }
}

/// Whether the store may take the file, and how far it has it.
async fn begin(store: &Store, cluster: &ClusterRow, header: &Header) -> Result<ImportRow, TransferError> {
    let founded = patiently(|| ClusterRow::read(store)).await?;
    if let Some(founded) = &founded {
        founded.compare(cluster)?;
    }
    if let Some(import) = patiently(|| ImportRow::read(store)).await? {
        if import.export_id != header.export_id {
            return Err(if import.complete { TransferError::NotEmpty } else { TransferError::OtherImport });
        }
        return Ok(import);
    }
    if !patiently(|| store.list_buckets(None, 16)).await?.items.is_empty() {
        return Err(TransferError::NotEmpty);
    }
    let import = ImportRow { export_id: header.export_id.clone(), frames: 0, complete: false };
    patiently(|| import.write(store)).await?;
    Ok(import)
}

/// Frames that are written together.
#[derive(Default)]
struct Window {
    rows: Vec<Batch>,
    state: Vec<Vec<StateWrite>>,
    frames: u64,
}

impl Window {
    /// Reads up to a window's worth; true if that was the end.
    fn read(reader: &mut Reader, totals: &mut Totals) -> Result<(Self, bool), TransferError> {
        let mut window = Self::default();
        let begun = reader.position;
        while window.rows.len() + window.state.len() < WINDOW_FRAMES && reader.position - begun < WINDOW_BYTES {
            match reader.next()? {
                Some(Frame::Rows(rows)) => {
                    totals.add_rows(&rows);
                    window.rows.push(batch(rows).ok_or_else(|| reader.damaged("a frame is no batch of rows"))?);
                }
                Some(Frame::State(state)) => {
                    totals.add_state(&state);
                    window.state.push(writes(state).ok_or_else(|| reader.damaged("a frame is of no state table"))?);
                }
                Some(Frame::Mark(_)) => {}
                Some(Frame::End(_)) => return Ok((window, true)),
                Some(Frame::Header(_)) | None => return Err(reader.damaged("there is no end")),
            }
            window.frames = (window.rows.len() + window.state.len()) as u64;
        }
        Ok((window, false))
    }
}

fn batch(rows: Rows) -> Option<Batch> {
    let conversation = ConversationId::from_slice(&rows.conversation).ok()?;
    let rows = rows.rows.into_iter().map(|row| row.row()).collect::<Option<Vec<_>>>()?;
    let committed = rows.first()?.seq.checked_sub(1)?;
    let batch = Batch { conversation, epoch: IMPORT_EPOCH, committed, rows };
    batch.is_valid().then_some(batch)
}

fn writes(state: State) -> Option<Vec<StateWrite>> {
    let table = u8::try_from(state.table).ok().and_then(Table::from_number)?;
    let write = |row: super::format::StateMessage| StateWrite {
        table,
        partition: state.partition.clone(),
        key: row.key,
        value: Some(row.value),
        timestamp: row.timestamp,
    };
    (table != Table::Cluster).then(|| state.rows.into_iter().map(write).collect())
}

struct Importer<'a> {
    store: &'a Store,
    export_id: Bytes,
    /// Frames of the file that were seen, and how many of them the store had before.
    frames: u64,
    done: u64,
}

impl Importer<'_> {
    /// Writes a window and marks it, unless the store has it already.
    async fn write(&mut self, window: Window) -> Result<(), TransferError> {
        self.frames += window.frames;
        if window.frames == 0 || self.frames <= self.done {
            return Ok(());
        }
        let appends: Vec<_> = window.rows.into_iter().map(|batch| self.append(Arc::new(batch))).collect();
        stream::iter(appends).buffer_unordered(AT_ONCE).try_collect::<()>().await?;
        let writes: Vec<_> = window.state.into_iter().map(|writes| self.put(writes)).collect();
        stream::iter(writes).buffer_unordered(AT_ONCE).try_collect::<()>().await?;
        self.mark(false).await?;
        Ok(())
    }

    async fn append(&self, batch: Arc<Batch>) -> Result<(), StoreError> {
        patiently(|| async {
            let (sender, mut receiver) = mpsc::channel(1);
            let request = AppendRequest { token: 0, batch: batch.clone() };
            // One request, one answer.
            let done = Arc::new(move |answers| drop(sender.try_send(answers)));
            self.store.submit(vec![request], done);
            match receiver.recv().await.and_then(|answers| answers.into_iter().next()) {
                Some((_, outcome)) => outcome,
                None => Err(StoreError::Unconfirmed("the store gave no answer".into())),
            }
        })
        .await
    }

    async fn put(&self, writes: Vec<StateWrite>) -> Result<(), StoreError> {
        patiently(|| self.store.write(writes.clone())).await
    }

    async fn mark(&self, complete: bool) -> Result<(), StoreError> {
        let import = ImportRow { export_id: self.export_id.clone(), frames: self.frames, complete };
        patiently(|| import.write(self.store)).await
    }
}
