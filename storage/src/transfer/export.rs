//! From a store into a file.

use std::path::{Path, PathBuf};

use futures::{StreamExt as _, TryStreamExt as _, stream};
use im_proto::environment::Random;

use super::{
    ClusterFacts, Progress, Step, Totals, TransferError,
    format::{Frame, Header, Mark, Reader, Rows, State, Writer},
    walk::{self, Conversation, patiently},
};
use crate::{
    Inventory as _, Store,
    model::{Page, StoreError},
};

/// Partitions of one page of a list; a mark follows each page.
const PAGE: usize = 128;
/// Conversations or partitions that are read at a time.
const AT_ONCE: usize = 16;

/// Where frames go.
trait Sink {
    fn rows(&mut self, rows: Rows) -> Result<(), TransferError>;
    fn state(&mut self, state: State) -> Result<(), TransferError>;
    fn mark(&mut self, mark: Mark) -> Result<(), TransferError>;
}

impl Sink for Writer {
    fn rows(&mut self, rows: Rows) -> Result<(), TransferError> {
        self.put(&Frame::Rows(rows))
    }

    fn state(&mut self, state: State) -> Result<(), TransferError> {
        self.put(&Frame::State(state))
    }

    fn mark(&mut self, mark: Mark) -> Result<(), TransferError> {
        self.put(&Frame::Mark(mark))?;
        self.flush()
    }
}

/// Counts only.
struct Nowhere;

impl Sink for Nowhere {
    fn rows(&mut self, _: Rows) -> Result<(), TransferError> {
        Ok(())
    }

    fn state(&mut self, _: State) -> Result<(), TransferError> {
        Ok(())
    }

    fn mark(&mut self, _: Mark) -> Result<(), TransferError> {
        Ok(())
    }
}

/// Writes everything into `file`, which appears when it is complete. Until then it is `file.partial`, and an export that was cut off
/// goes on in it. No router may use the store meanwhile. Uses blocking file operations: for tools.
pub async fn export(
    store: &Store,
    facts: &ClusterFacts,
    file: &Path,
    random: &dyn Random,
    progress: impl FnMut(Progress<'_>),
) -> Result<Totals, TransferError> {
    if file.try_exists().map_err(|source| io(file, source))? {
        return Err(TransferError::Exists(file.to_owned()));
    }
    let partial = partial(file);
    let resumed = Resume::find(&partial, facts)?;
    let mut writer = Writer::open(&partial, resumed.as_ref().map_or(0, |resume| resume.length))?;
    let mark = match resumed {
        Some(resume) => resume.mark,
        None => {
            let export_id = [random.next_u64().to_be_bytes(), random.next_u64().to_be_bytes()].concat();
            writer.put(&Frame::Header(Header::new(facts, export_id.into())))?;
            let mark = Mark::default();
            writer.mark(mark.clone())?;
            mark
        }
    };
    let totals = walk_all(store, mark, &mut writer, progress).await?;
    writer.put(&Frame::End(totals.clone()))?;
    writer.sync()?;
    std::fs::rename(&partial, file).map_err(|source| io(file, source))?;
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::File::open(folder).and_then(|folder| folder.sync_all()).map_err(|source| io(file, source))?;
    Ok(totals)
}

/// What an export would hold, without a file: to compare two stores.
pub async fn totals(store: &Store, progress: impl FnMut(Progress<'_>)) -> Result<Totals, TransferError> {
    walk_all(store, Mark::default(), &mut Nowhere, progress).await
}

async fn walk_all(
    store: &Store,
    mark: Mark,
    sink: &mut impl Sink,
    mut progress: impl FnMut(Progress<'_>),
) -> Result<Totals, TransferError> {
    let Mark { mut in_state, mut place, mut totals } = mark;
    while !in_state {
        let Page { items, next, done_permille } = patiently(|| store.list_buckets(place.clone(), PAGE)).await?;
        let begin = items.into_iter().map(|bucket| first_frames(store, bucket)).collect::<Vec<_>>();
        let mut begun = stream::iter(begin).buffered(AT_ONCE);
        while let Some((mut frames, conversation)) = begun.try_next().await? {
            let mut conversation = conversation;
            while !frames.is_empty() {
                for rows in frames {
                    totals.add_rows(&rows);
                    sink.rows(rows)?;
                }
                frames = match &mut conversation {
                    Some(conversation) => conversation.next().await?,
                    None => Vec::new(),
                };
            }
        }
        (in_state, place) = (next.is_none(), next);
        sink.mark(Mark { in_state, place: place.clone(), totals: totals.clone() })?;
        progress(Progress { step: Step::Messages, permille: done_permille, totals: &totals });
    }
    loop {
        let Page { items, next, done_permille } = patiently(|| store.list_partitions(place.clone(), PAGE)).await?;
        let read = items.into_iter().map(|partition| walk::partition(store, partition)).collect::<Vec<_>>();
        let mut partitions = stream::iter(read).buffered(AT_ONCE);
        while let Some(frames) = partitions.try_next().await? {
            for state in frames {
                totals.add_state(&state);
                sink.state(state)?;
            }
        }
        progress(Progress { step: Step::State, permille: done_permille, totals: &totals });
        place = next;
        if place.is_none() {
            return Ok(totals);
        }
        sink.mark(Mark { in_state, place: place.clone(), totals: totals.clone() })?;
    }
}

/// The first frames of the conversation that begins in a bucket, and the rest of it.
async fn first_frames(
    store: &Store,
    bucket: (im_proto::ConversationId, crate::BucketId),
) -> Result<(Vec<Rows>, Option<Conversation<'_>>), StoreError> {
    let Some(mut conversation) = Conversation::begin(store, bucket).await? else { return Ok((Vec::new(), None)) };
    let frames = conversation.next().await?;
    Ok((frames, Some(conversation)))
}

/// Where an export that was cut off goes on.
struct Resume {
    /// Of the file, up to and with the last mark.
    length: u64,
    mark: Mark,
}

impl Resume {
    /// Looks into a file; nothing if there is nothing to go on with. What is behind the last mark, half a frame included, is dropped.
    fn find(partial: &Path, facts: &ClusterFacts) -> Result<Option<Self>, TransferError> {
        if !partial.try_exists().map_err(|source| io(partial, source))? {
            return Ok(None);
        }
        let mut reader = match Reader::open(partial) {
            Ok(reader) => reader,
            Err(TransferError::Format { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut found = None;
        loop {
            match reader.next() {
                Ok(Some(Frame::Header(header))) if header.facts().as_ref() != Some(facts) => {
                    return Err(TransferError::OtherExport(partial.to_owned()));
                }
                Ok(Some(Frame::Mark(mark))) => found = Some(Self { length: reader.position, mark }),
                Ok(Some(_)) => {}
                Ok(None) | Err(TransferError::Format { .. }) => return Ok(found),
                Err(error) => return Err(error),
            }
        }
    }
}

fn partial(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".partial");
    name.into()
}

fn io(path: &Path, source: std::io::Error) -> TransferError {
    TransferError::File { path: path.to_owned(), source }
}
