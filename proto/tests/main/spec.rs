//! SPEC.md against the code and the schema: its tables are what they say.
//!
//! `IM_WRITE_SPEC=1 cargo test -p im-proto spec` writes the tables again; the text around them is written by people.

use std::{fmt::Write as _, fs, path::PathBuf};

use im_proto::{PROTOCOL_VERSIONS, StatusCode, limits, method::Method};
use prost_types::field_descriptor_proto::Type;

use crate::schema::{Schema, type_name, type_text};

fn path() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("SPEC.md")
}

fn tables() -> Vec<(&'static str, String)> {
    let schema = Schema::load();
    vec![
        ("version", format!("The window of this text is **{} to {}**.\n", PROTOCOL_VERSIONS.0, PROTOCOL_VERSIONS.1)),
        ("limits", limit_table()),
        ("statuses", status_table()),
        ("methods", method_table(&schema)),
        ("client frames", frame_table(&schema, "ClientFrame")),
        ("server frames", frame_table(&schema, "ServerFrame")),
        (
            "frame parts",
            message_table(&schema, "client.proto", |name| !is_frame(&schema, name) && !name.ends_with("Frame")),
        ),
        ("bodies", message_table(&schema, "body.proto", |_| true)),
        ("api", message_table(&schema, "api.proto", |_| true)),
        ("peer", message_table(&schema, "peer.proto", |_| true)),
        ("link", message_table(&schema, "link.proto", |_| true)),
        ("enums", enum_table(&schema)),
    ]
}

fn limit_table() -> String {
    let mut out = String::from("| limit | value | of |\n|---|---|---|\n");
    for (name, value, what) in limits::ALL {
        writeln!(out, "| `{name}` | {value} | {} |", what.trim()).expect("a string");
    }
    out
}

fn status_table() -> String {
    let mut out = String::from("| number | text | retry | ends the connection | meaning |\n|---|---|---|---|---|\n");
    for code in StatusCode::ALL {
        let closes = if code.closes() { "yes" } else { "no" };
        let (number, text, retry, meaning) = (code.number(), code.text(), code.retry().name(), code.meaning().trim());
        writeln!(out, "| {number} | {text} | {retry} | {closes} | {meaning} |").expect("a string");
    }
    out
}

fn method_table(schema: &Schema) -> String {
    let mut out = String::from("| number | method | audience | cost | request | reply |\n|---|---|---|---|---|---|\n");
    for method in Method::ALL {
        let audience: Vec<&str> = method.audience().iter().map(|audience| audience.name()).collect();
        let name = method.full_name().trim_start_matches("im.v1.");
        let (request, reply) = schema.method(name);
        let (number, audience, cost) = (method.number(), audience.join(", "), method.cost());
        writeln!(out, "| {number} | `{name}` | {audience} | {cost} | `{request}` | `{reply}` |").expect("a string");
    }
    out
}

fn frame_table(schema: &Schema, frame: &str) -> String {
    let mut out = String::from("| number | frame | fields |\n|---|---|---|\n");
    for field in &schema.message(frame).field {
        let name = type_name(field);
        writeln!(out, "| {} | `{name}` | {} |", field.number(), fields(schema, name)).expect("a string");
    }
    out
}

fn is_frame(schema: &Schema, name: &str) -> bool {
    ["ClientFrame", "ServerFrame"]
        .iter()
        .any(|frame| schema.message(frame).field.iter().any(|field| type_name(field) == name))
}

fn message_table(schema: &Schema, file: &str, listed: impl Fn(&str) -> bool) -> String {
    let mut out = String::from("| message | fields |\n|---|---|\n");
    for name in schema.messages_of(file).iter().filter(|name| listed(name)) {
        writeln!(out, "| `{name}` | {} |", fields(schema, name)).expect("a string");
    }
    out
}

/// `1 name: type`, the members of a oneof in brackets.
fn fields(schema: &Schema, message: &str) -> String {
    let slots = schema.slots(message).into_iter().map(|slot| {
        let members: Vec<String> = slot
            .members
            .iter()
            .map(|field| format!("{} {}: {}", field.number(), field.name(), type_text(field)))
            .collect();
        let members = members.join(" / ");
        if slot.one_of.is_some() { format!("one of ({members})") } else { members }
    });
    let slots: Vec<String> = slots.collect();
    if slots.is_empty() { "none".to_owned() } else { slots.join(" · ") }
}

fn enum_table(schema: &Schema) -> String {
    let mut out = String::from("| enum | values |\n|---|---|\n");
    let mut names: Vec<&str> = schema
        .message_names()
        .flat_map(|name| &schema.message(name).field)
        .filter(|field| field.r#type() == Type::Enum)
        .map(type_name)
        .collect();
    names.sort_unstable();
    names.dedup();
    for name in names {
        let values: Vec<String> =
            schema.enum_values(name).iter().map(|(value, number)| format!("{number} {value}")).collect();
        writeln!(out, "| `{name}` | {} |", values.join(" · ")).expect("a string");
    }
    out
}

/// The text with each table between its two marks as it should be.
fn with_tables(text: &str) -> String {
    let mut text = text.to_owned();
    for (name, table) in tables() {
        let (begin, end) = (format!("<!-- table: {name} -->\n"), "<!-- end -->");
        let start = text.find(&begin).unwrap_or_else(|| panic!("SPEC.md has no table {name:?}")) + begin.len();
        let length = text[start..].find(end).unwrap_or_else(|| panic!("the table {name:?} of SPEC.md has no end"));
        text.replace_range(start..start + length, &table);
    }
    text
}

#[test]
fn the_tables_of_the_specification_are_those_of_the_code_and_the_schema() {
    let text = fs::read_to_string(path()).expect("SPEC.md");
    let expected = with_tables(&text);
    if std::env::var_os("IM_WRITE_SPEC").is_some() {
        fs::write(path(), &expected).expect("written");
        return;
    }
    let different = text.lines().zip(expected.lines()).find(|(written, now)| written != now);
    assert_eq!(different, None, "SPEC.md (left) differs from the code and the schema (right)");
    assert_eq!(text, expected);
}

#[test]
fn the_specification_explains_every_frame_and_names_every_file_of_vectors() {
    let text = fs::read_to_string(path()).expect("SPEC.md");
    let prose: String = text.lines().filter(|line| !line.starts_with('|')).collect::<Vec<_>>().join("\n");
    let schema = Schema::load();
    for frame in ["ClientFrame", "ServerFrame"] {
        for field in &schema.message(frame).field {
            let name = format!("`{}", type_name(field));
            assert!(prose.contains(&name), "{name}` is in no sentence of SPEC.md");
        }
    }
    for entry in fs::read_dir(path().with_file_name("vectors")).expect("vectors") {
        let name = entry.expect("an entry").file_name().into_string().expect("a name");
        assert!(prose.contains(&name), "SPEC.md does not name vectors/{name}");
    }
}
