//! `im pipe`: each line of standard input becomes one text message; many in flight, order kept, across reconnects.
//!
//! A line is what stands before a newline, whatever bytes that are, as long as they are UTF-8 and fit into a body. The last line
//! needs no newline. A line that cannot be sent ends the command with its number, after all lines before it are stored.

use std::{
    collections::VecDeque,
    io::{self, BufRead, BufReader, Read},
};

use im_proto::body;
use tokio::{sync::mpsc, time::Instant};

use crate::{
    client::{Client, PendingSend, Sent},
    config::Target,
    error::SendError,
};

use super::{TEXT_BYTES_MAX, failure::Failure, interrupt::Interrupt};

/// Lines handed over at once, and batches that wait: enough that reading and sending overlap.
const BATCH_LINES: usize = 256;
const BATCHES_WAITING: usize = 4;

/// Why reading stopped before the end of the input.
#[derive(Debug, PartialEq, Eq)]
struct BadInput(String);

type Batch = Vec<Result<String, BadInput>>;

pub(super) async fn run(client: &Client, target: Target, interrupt: &Interrupt) -> Result<(), Failure> {
    let started = Instant::now();
    let mut lines = read_in_background(io::stdin())?;
    let mut sending = Sending { client, target, pending: VecDeque::new(), sent: 0, first: None, last: None };
    let stopped = loop {
        let batch = tokio::select! {
            biased;
            batch = lines.recv() => batch,
            () = interrupt.requested() => break Some(Failure::interrupted()),
        };
        let Some(batch) = batch else { break None };
        if let Some(failure) = sending.send(batch, interrupt).await? {
            break Some(failure);
        }
    };
    let outcome = sending.finish().await;
    sending.summary(started);
    outcome?;
    stopped.map_or(Ok(()), Err)
}

/// What is under way.
struct Sending<'a> {
    client: &'a Client,
    target: Target,
    pending: VecDeque<PendingSend>,
    /// Lines that are stored.
    sent: u64,
    first: Option<Sent>,
    last: Option<Sent>,
}

impl Sending<'_> {
    /// Hands the lines over; waits while the window is full. Some: the input ends here.
    async fn send(&mut self, batch: Batch, interrupt: &Interrupt) -> Result<Option<Failure>, Failure> {
        for line in batch {
            let line = match line {
                Ok(line) => line,
                Err(BadInput(text)) => return Ok(Some(Failure::Failed(text))),
            };
            while let Some(outcome) = self.pending.front_mut().and_then(PendingSend::try_outcome) {
                self.pending.pop_front();
                self.note(outcome)?;
            }
            tokio::select! {
                biased;
                pending = self.client.enqueue(self.target.clone(), body::text(line)) => {
                    let number = self.sent + self.pending.len() as u64 + 1;
                    self.pending.push_back(pending.map_err(|error| refused(number, error))?);
                }
                () = interrupt.requested() => return Ok(Some(Failure::interrupted())),
            }
        }
        Ok(None)
    }

    /// Waits for all outcomes.
    async fn finish(&mut self) -> Result<(), Failure> {
        while let Some(pending) = self.pending.pop_front() {
            let outcome = pending.await;
            self.note(outcome)?;
        }
        Ok(())
    }

    fn note(&mut self, outcome: Result<Sent, SendError>) -> Result<(), Failure> {
        let sent = outcome.map_err(|error| refused(self.sent + 1, error))?;
        self.sent += 1;
        self.first.get_or_insert(sent);
        self.last = Some(sent);
        Ok(())
    }

    fn summary(&self, started: Instant) {
        let seconds = started.elapsed().as_secs_f64();
        match (self.first, self.last) {
            (Some(first), Some(last)) => {
                let rate = self.sent as f64 / seconds.max(0.001);
                let (from, to) = (first.seq, last.seq);
                eprintln!("im: {} messages stored, seq {from} to {to}, in {seconds:.1} s ({rate:.0}/s)", self.sent);
            }
            _ => eprintln!("im: 0 messages stored"),
        }
    }
}

fn refused(line: u64, error: SendError) -> Failure {
    match Failure::from(error) {
        Failure::Failed(text) => Failure::Failed(format!("line {line}: {text}")),
        other => other,
    }
}

/// Standard input can only be read by a thread that waits for it.
fn read_in_background(input: impl Read + Send + 'static) -> Result<mpsc::Receiver<Batch>, Failure> {
    let (sender, receiver) = mpsc::channel(BATCHES_WAITING);
    let read = move || {
        let mut lines = Lines { input: BufReader::with_capacity(64 * 1024, input), number: 0 };
        while let Some(batch) = lines.next_batch() {
            let is_last = batch.last().is_some_and(Result::is_err);
            if sender.blocking_send(batch).is_err() || is_last {
                return;
            }
        }
    };
    std::thread::Builder::new()
        .name("stdin".to_owned())
        .spawn(read)
        .map_err(|error| Failure::Failed(format!("cannot start a thread to read standard input: {error}")))?;
    Ok(receiver)
}

struct Lines<R> {
    input: BufReader<R>,
    /// Of the last line, from 1.
    number: u64,
}

impl<R: Read> Lines<R> {
    /// Lines that are there without waiting for more than the first; `None` at the end.
    fn next_batch(&mut self) -> Option<Batch> {
        let mut batch = Batch::new();
        while batch.len() < BATCH_LINES {
            match self.next_line().transpose() {
                None => break,
                Some(line) => batch.push(line),
            }
            if batch.last().is_some_and(Result::is_err) || !self.input.buffer().contains(&b'\n') {
                break;
            }
        }
        (!batch.is_empty()).then_some(batch)
    }

    fn next_line(&mut self) -> Result<Option<String>, BadInput> {
        let mut line = Vec::new();
        let mut bounded = (&mut self.input).take(TEXT_BYTES_MAX as u64 + 1);
        bounded
            .read_until(b'\n', &mut line)
            .map_err(|error| BadInput(format!("cannot read standard input: {error}")))?;
        if line.is_empty() {
            return Ok(None);
        }
        self.number += 1;
        if line.last() == Some(&b'\n') {
            line.pop();
        } else if line.len() > TEXT_BYTES_MAX {
            return Err(BadInput(format!(
                "line {} has more than {TEXT_BYTES_MAX} bytes: send it in parts; the lines before it are stored",
                self.number
            )));
        }
        let text = String::from_utf8(line);
        let number = self.number;
        text.map(Some).map_err(|_| BadInput(format!("line {number} is not UTF-8; the lines before it are stored")))
    }
}

#[cfg(test)]
mod tests {
    use im_proto::limits;

    use super::*;

    fn lines(input: &[u8]) -> Batch {
        let mut lines = Lines { input: BufReader::with_capacity(16, input), number: 0 };
        let mut all = Batch::new();
        while let Some(batch) = lines.next_batch() {
            all.extend(batch);
        }
        all
    }

    fn texts(input: &[u8]) -> Vec<String> {
        lines(input).into_iter().map(Result::unwrap).collect()
    }

    #[test]
    fn every_line_is_a_message_byte_for_byte() {
        assert_eq!(texts(b""), [""; 0]);
        assert_eq!(texts(b"\n"), [""]);
        assert_eq!(texts(b"a\n\nb\n"), ["a", "", "b"]);
        assert_eq!(texts(b"a\r\n\tb \n"), ["a\r", "\tb "]);
    }

    #[test]
    fn the_last_line_needs_no_newline() {
        assert_eq!(texts(b"one\ntwo"), ["one", "two"]);
    }

    #[test]
    fn bad_utf_8_names_the_line_and_keeps_what_was_before() {
        let all = lines(b"good\n\xff\nnever read\n");
        assert_eq!(all[0], Ok("good".to_owned()));
        assert!(all[1].as_ref().unwrap_err().0.starts_with("line 2 is not UTF-8"));
    }

    #[test]
    fn a_line_that_fits_into_no_body_is_refused_before_it_is_held() {
        let mut input = vec![b'x'; TEXT_BYTES_MAX];
        input.push(b'\n');
        assert_eq!(texts(&input)[0].len(), TEXT_BYTES_MAX);
        assert!(body::text(texts(&input).remove(0)).len() <= limits::BODY_BYTES_MAX);
        input.insert(0, b'x');
        let refusal = "line 1 has more than 65520 bytes: send it in parts; the lines before it are stored";
        assert_eq!(lines(&input)[0].as_ref().unwrap_err().0, refusal);
    }
}
