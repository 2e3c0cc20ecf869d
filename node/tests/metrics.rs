//! Holds docs/metrics.md against the code, and both against what a server serves.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use crate::{
    server::{ANY, Server},
    tidy,
};

/// Labels whose values are a fixed set of words; docs/metrics.md names them. A label outside this list may be without a bound.
const LABELS: [&str; 9] = ["kind", "lane", "limit", "method", "operation", "reason", "status", "transport", "version"];
/// Units that a histogram's name ends in; the rest of a row says what is counted.
const HISTOGRAM_UNITS: [&str; 4] = ["seconds", "bytes", "rows", "requests"];
/// Far above what one process has, far below what a label without a bound would make.
const SERIES_MAX: usize = 1_000;

#[derive(Clone, Debug, PartialEq, Eq)]
struct Metric {
    kind: String,
    labels: BTreeSet<String>,
}

/// Name, type and labels of every metric that the sources register.
fn of_the_code() -> BTreeMap<String, Metric> {
    let mut found: BTreeMap<String, Metric> = BTreeMap::new();
    for (name, text) in tidy::programs() {
        for kind in ["counter", "gauge", "histogram"] {
            for call in text.split(&format!("{kind}!(")).skip(1) {
                let call = call.split(')').next().unwrap_or_default();
                let words: Vec<&str> = call.split('"').skip(1).step_by(2).collect();
                let Some((metric, _)) = words.split_first().filter(|(metric, _)| metric.starts_with("im_")) else {
                    panic!("{name}: the name of a metric must be written out: {call}");
                };
                let labels = call.match_indices("=>").filter_map(|(at, _)| call[..at].rsplit('"').nth(1));
                let entry = found
                    .entry((*metric).to_owned())
                    .or_insert_with(|| Metric { kind: kind.to_owned(), labels: BTreeSet::new() });
                assert_eq!(entry.kind, kind, "{metric} has two types");
                entry.labels.extend(labels.map(str::to_owned));
            }
        }
    }
    found
}

/// The rows of the table: name, then type, unit, labels and what it is.
fn of_the_table() -> BTreeMap<String, Vec<String>> {
    let text = fs::read_to_string(crate::workspace().join("docs/metrics.md")).expect("the document");
    let rows = text.lines().filter(|line| line.starts_with("| im_"));
    rows.map(|row| {
        let mut cells = row.trim_matches('|').split('|').map(|cell| cell.trim().to_owned());
        (cells.next().unwrap_or_default(), cells.collect())
    })
    .collect()
}

#[test]
fn metrics_are_those_of_the_table() {
    let (code, table) = (of_the_code(), of_the_table());
    let names = |of: &BTreeSet<&String>| of.iter().map(|name| name.as_str()).collect::<Vec<_>>().join(", ");
    let (coded, listed): (BTreeSet<_>, BTreeSet<_>) = (code.keys().collect(), table.keys().collect());
    let missing: BTreeSet<&String> = coded.difference(&listed).copied().collect();
    let stale: BTreeSet<&String> = listed.difference(&coded).copied().collect();
    assert!(
        missing.is_empty() && stale.is_empty(),
        "not in docs/metrics.md: {}; there alone: {}",
        names(&missing),
        names(&stale)
    );
    for (name, metric) in &code {
        let row = &table[name];
        let labels: BTreeSet<String> =
            row[2].split(", ").filter(|label| !label.is_empty()).map(str::to_owned).collect();
        assert_eq!((&row[0], &labels), (&metric.kind, &metric.labels), "{name}: type or labels in docs/metrics.md");
        assert!(!row[1].is_empty() && !row[3].is_empty(), "{name} has no unit or no meaning in docs/metrics.md");
    }
}

#[test]
fn names_tell_type_and_unit_and_labels_have_a_bound() {
    let table = of_the_table();
    for (name, metric) in of_the_code() {
        let unit = &table[&name][1];
        let base = name.strip_suffix("_total").unwrap_or(&name);
        assert_eq!(name.ends_with("_total"), metric.kind == "counter", "{name} is a {}", metric.kind);
        for suffix in ["seconds", "bytes"] {
            assert_eq!(base.ends_with(&format!("_{suffix}")), unit == suffix, "{name} counts {unit}");
        }
        if metric.kind == "histogram" {
            assert!(HISTOGRAM_UNITS.iter().any(|unit| name.ends_with(&format!("_{unit}"))), "{name} has no unit");
        }
        for label in &metric.labels {
            assert!(LABELS.contains(&label.as_str()), "{name}: are the values of {label} a fixed set of words?");
        }
    }
}

#[test]
fn a_server_serves_metrics_of_the_table_alone_and_not_too_many() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(&folder.path().join("data"), &ANY);
    let answer = server.get("/metrics");
    let table = of_the_table();
    let lines: Vec<&str> = answer.lines().filter(|line| line.starts_with("im_")).collect();
    assert!(lines.len() > 50 && lines.len() < SERIES_MAX, "{} series", lines.len());
    for line in lines {
        let name = line.split(['{', ' ']).next().unwrap_or_default();
        let base = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
        let known = table.contains_key(name) || base.is_some_and(|base| table.contains_key(base));
        assert!(known, "{name} is not in docs/metrics.md");
    }
    // Whoever looks for a slow disk finds it: the buckets reach from a fast one to a client's patience.
    for bound in ["0.0001", "0.001", "0.1", "5"] {
        assert!(answer.contains(&format!("im_storage_commit_seconds_bucket{{le=\"{bound}\"}}")), "{bound}");
    }
}

/// The value of a series.
fn value(answer: &str, series: &str) -> f64 {
    let line = answer.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {series}")).parse().expect("a number")
}

#[test]
fn how_long_messages_and_calls_take_is_counted() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(&folder.path().join("data"), &ANY);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let ann = server.client("ann").await;
        let me = im_client::Target::peer("ann").unwrap();
        ann.send(me.clone(), im_proto::body::text("hello")).await.unwrap();
        for _ in 0..3 {
            ann.history(me.clone(), 1, 0, 10, false).await.unwrap();
        }
        ann.close().await;
    });
    let answer = server.get("/metrics");
    // The first send of a worker is one of those that are timed.
    assert_eq!(value(&answer, "im_gateway_ack_seconds_count"), 1.0);
    let seconds = value(&answer, "im_gateway_ack_seconds_sum");
    assert!(seconds > 0.0 && seconds < 60.0, "{seconds}");
    let of =
        |name: &str, method: &str| value(&answer, &format!("im_router_call_seconds_{name}{{method=\"{method}\"}}"));
    assert_eq!((of("count", "MessageService.History"), of("count", "GroupService.Create")), (3.0, 0.0));
    let seconds = of("sum", "MessageService.History");
    assert!(seconds > 0.0 && seconds < 60.0, "{seconds}");
}
