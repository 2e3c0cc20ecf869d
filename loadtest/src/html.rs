//! Reports as one self-contained HTML file: text, tables and inline SVG, nothing from elsewhere and no scripts.

mod chart;

use std::fmt::Write as _;

use serde_json::Value;

use self::chart::{Bars, Lines, Mark, Series};

const STYLE: &str = "body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem;color:#1b1b1f;\
     background:#fff}h1{font-size:1.5rem}h2{font-size:1.2rem;margin-top:2.5rem;border-top:1px solid #ccc;padding-top:1rem}\
     h3{font-size:1rem;margin-bottom:.3rem}table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:.5rem 0}\
     td,th{padding:.2rem .7rem;border-bottom:1px solid #e3e3e8;text-align:right}td:first-child,th:first-child{text-align:left}\
     .bad{color:#b3261e;font-weight:600}.good{color:#1a6d35;font-weight:600}.note{color:#666}svg{max-width:100%;height:auto}\
     svg text{font:11px system-ui,sans-serif;fill:#444}";

/// All reports of a run, one below the other.
pub fn page(title: &str, reports: &[Value]) -> String {
    let mut out = String::from("<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">");
    let _ = write!(out, "<meta name=\"viewport\" content=\"width=device-width\"><title>{}</title>", escape(title));
    let _ = write!(out, "<style>{STYLE}</style></head><body><h1>{}</h1>", escape(title));
    if let Some(first) = reports.first() {
        machine(&mut out, first);
    }
    goals(&mut out, reports);
    for one in reports {
        report(&mut out, one);
    }
    out.push_str("</body></html>\n");
    out
}

fn machine(out: &mut String, report: &Value) {
    let machine = &report["machine"];
    let _ = write!(
        out,
        "<p class=\"note\">{} cores, {}, {:.0} GiB, Linux {}, {}; loadtest {}, server {}</p>",
        number(&machine["cores"]),
        escape(text(&machine["cpu"])),
        machine["memory_bytes"].as_f64().unwrap_or(0.0) / f64::from(1 << 30),
        escape(text(&machine["kernel"])),
        escape(text(&machine["filesystem"])),
        escape(text(&report["version"])),
        Some(text(&report["server_version"]))
            .filter(|version| !version.is_empty())
            .map_or_else(|| "–".to_owned(), escape),
    );
}

fn goals(out: &mut String, reports: &[Value]) {
    let all: Vec<(&Value, &Value)> =
        reports.iter().flat_map(|report| items(&report["goals"]).iter().map(move |goal| (report, goal))).collect();
    if all.is_empty() {
        return;
    }
    out.push_str("<h2>Goals</h2><table><tr><th>goal</th><th>what</th><th>wanted</th><th>measured</th><th></th></tr>");
    for (report, goal) in all {
        let (class, word) = if goal["met"].as_bool() == Some(true) { ("good", "met") } else { ("bad", "missed") };
        let _ = write!(
            out,
            "<tr><td>{}</td><td style=\"text-align:left\">{} ({})</td><td>{} {}</td><td>{}</td><td class=\"{class}\">{word}</td></tr>",
            escape(text(&goal["id"])),
            escape(text(&goal["what"])),
            escape(text(&report["scenario"])),
            escape(text(&goal["bound"])),
            number(&goal["wanted"]),
            number(&goal["measured"]),
        );
    }
    out.push_str("</table>");
}

fn report(out: &mut String, report: &Value) {
    let heading = format!("{} over {}", text(&report["scenario"]), text(&report["transport"]));
    let _ = write!(out, "<h2>{}</h2>", escape(&heading));
    let counted =
        ["lost", "duplicated", "reordered", "holes", "corrupted"].iter().any(|key| report[*key].as_u64() > Some(0));
    // A promise may be broken without a number, and who could not run or was the limit has shown nothing.
    let failed = ["generator_was_the_limit", "could_not_run"].iter().any(|key| report[*key] == true);
    let bad = counted || failed || !items(&report["broken"]).is_empty();
    let _ = write!(out, "<p class=\"{}\">{}</p>", if bad { "bad" } else { "good" }, escape(text(&report["verdict"])));
    for reason in items(&report["reasons"]) {
        let _ = write!(out, "<p class=\"note\">{}</p>", escape(text(reason)));
    }
    figures(out, report);
    let details = &report["details"];
    timeline(out, &details["timeline"]);
    percentiles(out, report);
    curve(out, &details["curve"]);
    memory(out, report);
    spread(out, report);
    phases(out, &details["phases"]);
    points(out, &details["scale"]);
}

fn figures(out: &mut String, report: &Value) {
    let rows = [
        ("connections", number(&report["connections"])),
        ("acknowledged a second", number(&report["acked_per_s"])),
        ("delivered a second", number(&report["delivered_per_s"])),
        ("server, cores", measured(&report["server"]["cpu_cores"])),
        ("generator, cores", number(&report["generator"]["cpu_cores"])),
        ("others, cores", number(&report["other_cpu_cores"])),
        ("disk flushes", number(&report["disk_flushes"])),
        ("lost, duplicated, reordered", ["lost", "duplicated", "reordered"].map(|key| number(&report[key])).join(", ")),
    ];
    out.push_str("<table>");
    for (name, value) in rows {
        let _ = write!(out, "<tr><td>{name}</td><td>{value}</td></tr>");
    }
    // Longer than any percentile, if its end came after the measured time.
    if let Some(longest) = report["details"]["longest_wait_us"].as_f64() {
        let ms = chart::short(longest / 1000.0);
        let _ = write!(out, "<tr><td>longest wait for an acknowledgement, ms</td><td>{ms}</td></tr>");
    }
    if let Some(held_up) = report["details"]["held_up"].as_u64() {
        let held_up = chart::whole(held_up);
        let _ = write!(out, "<tr><td>not begun at the end, for nothing could be written</td><td>{held_up}</td></tr>");
    }
    if let Some(ratios) = report["details"]["ratios"].as_object() {
        for (name, ratio) in ratios {
            let _ = write!(out, "<tr><td>of the {} in the same run</td><td>{}</td></tr>", escape(name), number(ratio));
        }
    }
    out.push_str("</table>");
}

/// Throughput over time; after faults also how long service was away.
fn timeline(out: &mut String, timeline: &Value) {
    let samples = items(&timeline["samples"]);
    let interval_ms = timeline["interval_ms"].as_f64().unwrap_or(100.0);
    if samples.len() < 2 {
        return;
    }
    let line = |key: &str, factor: f64| -> Vec<(f64, f64)> {
        samples.iter().map(|sample| (float(&sample["at_ms"]) / 1000.0, float(&sample[key]) * factor)).collect()
    };
    let marks: Vec<Mark> = items(&timeline["marks"])
        .iter()
        .map(|mark| Mark {
            at: float(&mark["at_ms"]) / 1000.0,
            until: (float(&mark["at_ms"]) + float(&mark["back_after_ms"])) / 1000.0,
            what: text(&mark["what"]).to_owned(),
        })
        .collect();
    let heading = if marks.is_empty() { "Throughput over time" } else { "Failover timeline" };
    let _ = write!(out, "<h3>{heading}</h3>");
    let acknowledged = Series { name: "acknowledged a second".to_owned(), points: line("acked", 1000.0 / interval_ms) };
    out.push_str(&Lines { x: "seconds", y: "a second", series: vec![acknowledged], marks, log: false }.svg());
    if !items(&timeline["marks"]).is_empty() {
        let stalled = Series { name: "conversations that wait".to_owned(), points: line("stalled", 1.0) };
        out.push_str(&Lines { x: "seconds", y: "waiting", series: vec![stalled], marks: Vec::new(), log: false }.svg());
        out.push_str("<table><tr><th>fault</th><th>at, s</th><th>back after, ms</th><th>waited at most</th></tr>");
        for mark in items(&timeline["marks"]) {
            let back = if mark["still_stalled"].as_bool() == Some(true) {
                "not before the next".to_owned()
            } else {
                number(&mark["back_after_ms"])
            };
            let (what, at) = (escape(text(&mark["what"])), float(&mark["at_ms"]) / 1000.0);
            let _ = write!(
                out,
                "<tr><td>{what}</td><td>{at:.1}</td><td>{back}</td><td>{}</td></tr>",
                number(&mark["stalled_max"])
            );
        }
        out.push_str("</table>");
    }
}

const PERCENTILES: [&str; 5] = ["p50", "p90", "p99", "p999", "max"];

fn percentiles(out: &mut String, report: &Value) {
    if report["delivery_us"]["max"].as_u64().unwrap_or(0) == 0 {
        return;
    }
    out.push_str("<h3>Latency, ms</h3><table><tr><th></th>");
    PERCENTILES.iter().for_each(|name| _ = write!(out, "<th>{name}</th>"));
    out.push_str("</tr>");
    let mut bars = Bars { y: "ms", groups: Vec::new() };
    for (name, key) in [("acknowledged", "ack_us"), ("delivered", "delivery_us")] {
        let values: Vec<f64> = PERCENTILES.iter().map(|of| float(&report[key][*of]) / 1000.0).collect();
        let _ = write!(out, "<tr><td>{name}</td>");
        values.iter().for_each(|value| _ = write!(out, "<td>{value:.2}</td>"));
        out.push_str("</tr>");
        bars.groups.push((name.to_owned(), PERCENTILES.iter().map(|of| (*of).to_owned()).zip(values).collect()));
    }
    out.push_str("</table>");
    out.push_str(&bars.svg());
}

/// Latency over throughput.
fn curve(out: &mut String, curve: &Value) {
    let points = items(curve);
    if points.is_empty() {
        return;
    }
    out.push_str("<h3>Latency over throughput</h3>");
    let line = |name: &str, key: &str| Series {
        name: name.to_owned(),
        points: points
            .iter()
            .map(|point| (float(&point["delivered_per_s"]), float(&point["delivery_us"][key]) / 1000.0))
            .collect(),
    };
    let series = vec![line("p50", "p50"), line("p99", "p99"), line("p99.9", "p999")];
    out.push_str(&Lines { x: "delivered a second", y: "ms", series, marks: Vec::new(), log: true }.svg());
    out.push_str("<table><tr><th>offered/s</th><th>delivered/s</th><th>p50 ms</th><th>p99 ms</th><th>p99.9 ms</th><th>busy</th></tr>");
    for point in points {
        let ms = |key: &str| float(&point["delivery_us"][key]) / 1000.0;
        let _ = write!(
            out,
            "<tr><td>{}</td><td>{}</td><td>{:.2}</td><td>{:.2}</td><td>{:.2}</td><td>{:.0} %</td></tr>",
            number(&point["offered_per_s"]),
            number(&point["delivered_per_s"]),
            ms("p50"),
            ms("p99"),
            ms("p999"),
            float(&point["busy"]) * 100.0
        );
    }
    out.push_str("</table>");
}

fn memory(out: &mut String, report: &Value) {
    let each = float(&report["server"]["rss_bytes_per_connection"]);
    if each <= 0.0 {
        return;
    }
    out.push_str("<h3>Memory a connection, KiB</h3>");
    let kernel = float(&report["details"]["kernel_slab_bytes_per_connection_both_ends"]);
    let bars = vec![("server".to_owned(), each / 1024.0), ("kernel, both ends".to_owned(), kernel / 1024.0)];
    out.push_str(&Bars { y: "KiB", groups: vec![(text(&report["transport"]).to_owned(), bars)] }.svg());
}

fn spread(out: &mut String, report: &Value) {
    let runs = items(&report["runs"]);
    if runs.len() < 2 {
        return;
    }
    out.push_str("<h3>Each of the runs</h3>");
    let bars = runs.iter().enumerate().map(|(index, run)| (format!("{}", index + 1), float(&run["delivered_per_s"])));
    let groups = vec![("delivered a second".to_owned(), bars.collect())];
    out.push_str(&Bars { y: "a second", groups }.svg());
}

/// What a scenario with several phases measured in each, as a table of its plain numbers.
fn phases(out: &mut String, phases: &Value) {
    table(out, "Phases", items(phases));
}

fn points(out: &mut String, points: &Value) {
    table(out, "Scale", items(points));
}

fn table(out: &mut String, heading: &str, rows: &[Value]) {
    let Some(first) = rows.first().and_then(Value::as_object) else { return };
    let keys: Vec<&String> = first.iter().filter(|(_, value)| !value.is_object()).map(|(key, _)| key).collect();
    let _ = write!(out, "<h3>{heading}</h3><table><tr>");
    keys.iter().for_each(|key| _ = write!(out, "<th>{}</th>", escape(&key.replace('_', " "))));
    out.push_str("</tr>");
    for row in rows {
        out.push_str("<tr>");
        for key in &keys {
            let value = &row[key.as_str()];
            let shown = value.as_str().map_or_else(|| number(value), escape);
            let _ = write!(out, "<td>{shown}</td>");
        }
        out.push_str("</tr>");
    }
    out.push_str("</table>");
}

fn items(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn float(value: &Value) -> f64 {
    value.as_f64().unwrap_or(0.0)
}

/// A number for people: thousands apart, no more digits than say something.
fn number(value: &Value) -> String {
    let counted = value.as_u64().map(chart::whole);
    counted.or_else(|| value.as_f64().map(chart::short)).unwrap_or_else(|| "–".to_owned())
}

/// What is never nothing if it was measured: of a server whose process is not known it is not.
fn measured(value: &Value) -> String {
    if value.as_f64() == Some(0.0) { number(&Value::Null) } else { number(value) }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_verdict_without_a_failure_looks_good() {
        let class = |more: Value| {
            let mut report = serde_json::json!({ "scenario": "soak", "verdict": "said", "lost": 0, "broken": [] });
            report.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            let page = page("loadtest", &[report]);
            ["bad", "good"].into_iter().find(|class| page.contains(&format!("<p class=\"{class}\">said</p>")))
        };
        assert_eq!(class(serde_json::json!({})), Some("good"));
        for failure in [
            serde_json::json!({ "lost": 1 }),
            serde_json::json!({ "broken": ["a send waited 2.0 s"] }),
            serde_json::json!({ "generator_was_the_limit": true }),
            serde_json::json!({ "could_not_run": true }),
        ] {
            assert_eq!(class(failure.clone()), Some("bad"), "{failure}");
        }
    }

    #[test]
    fn the_longest_wait_of_a_soak_is_shown_and_what_is_counted_is_whole() {
        let page = |details: Value| {
            page("loadtest", &[serde_json::json!({ "scenario": "soak", "connections": 6, "details": details })])
        };
        let soak = page(serde_json::json!({ "longest_wait_us": 70_000_000, "held_up": 1200 }));
        assert!(soak.contains("<td>longest wait for an acknowledgement, ms</td><td>70,000</td>"), "{soak}");
        assert!(soak.contains("could be written</td><td>1,200</td>"), "{soak}");
        assert!(soak.contains("<td>connections</td><td>6</td>"), "{soak}");
        assert!(!page(Value::Null).contains("longest wait"));
    }

    #[test]
    fn the_cores_and_the_version_of_a_server_that_is_not_known_are_not_shown_as_zero_and_nothing() {
        let page = |cores: f64, version: &str| {
            page("loadtest", &[serde_json::json!({ "server": { "cpu_cores": cores }, "server_version": version })])
        };
        let unknown = page(0.0, "");
        assert!(
            unknown.contains("<td>server, cores</td><td>–</td>") && unknown.contains(", server –</p>"),
            "{unknown}"
        );
        let known = page(0.5, "0.1.0");
        assert!(
            known.contains("<td>server, cores</td><td>0.500</td>") && known.contains(", server 0.1.0</p>"),
            "{known}"
        );
    }

    #[test]
    fn a_page_holds_every_plot_and_nothing_from_elsewhere() {
        let report = serde_json::json!({
            "scenario": "crash <b>", "transport": "tcp", "verdict": "every promise held", "connections": 4,
            "goals": [{ "id": "PF2", "what": "p99", "bound": "at most", "wanted": 10, "measured": 3, "met": true }],
            "delivery_us": { "p50": 1000, "p90": 1, "p99": 2, "p999": 3, "max": 4000 },
            "server": { "rss_bytes_per_connection": 2048.0 },
            "runs": [{ "delivered_per_s": 1.0 }, { "delivered_per_s": 2.0 }],
            "details": {
                "timeline": {
                    "interval_ms": 100,
                    "samples": [{ "at_ms": 100, "acked": 5, "stalled": 0 }, { "at_ms": 200, "acked": 0, "stalled": 2 }],
                    "marks": [{ "at_ms": 150, "what": "SIGKILL", "back_after_ms": 100, "stalled_max": 2 }]
                },
                "curve": [{ "offered_per_s": 10, "delivered_per_s": 10, "delivery_us": { "p50": 100, "p99": 500, "p999": 900 } }],
                "phases": [{ "flood": null, "server_cores": 0.5 }]
            }
        });
        let page = page("loadtest", &[report]);
        let headings = [
            "Goals",
            "Failover timeline",
            "Latency, ms",
            "Latency over throughput",
            "Memory a connection",
            "Each of the runs",
            "Phases",
        ];
        for heading in headings {
            assert!(page.contains(heading), "{heading}");
        }
        assert!(page.matches("<svg").count() >= 6);
        assert!(page.contains("crash &lt;b&gt;") && !page.contains("<b>"));
        for foreign in ["<script", "http://", "https://", "<link", "<img", "@import", "url("] {
            let found = page.replace("http://www.w3.org/2000/svg", "").contains(foreign);
            assert!(!found, "{foreign}");
        }
    }
}
