//! Generates from `defs/` the message types, the method table (from the `method` option of each rpc) and the shape of bodies that
//! `body::validate` follows.

use std::{env, error::Error, fmt::Write as _, fs, path::PathBuf};

use prost_reflect::{
    DescriptorPool, DynamicMessage, FieldDescriptor, Kind, MessageDescriptor, MethodDescriptor, Value,
};

const FILES: [&str; 6] = [
    "defs/im/v1/options.proto",
    "defs/im/v1/body.proto",
    "defs/im/v1/client.proto",
    "defs/im/v1/api.proto",
    "defs/im/v1/peer.proto",
    "defs/im/v1/link.proto",
];

/// Its service carries links between processes of a cluster. It is no part of the api: its methods have no number and no audience.
const LINK_FILE: &str = "im/v1/link.proto";

/// What travels on links is encoded from batches that a replay buffer shares, so its types are not generated.
const LINK_ITEMS: [(&str, &str); 3] =
    [("GatewayLinkItem", "GatewayBatch"), ("RouterLinkItem", "RouterBatch"), ("PeerLinkItem", "PeerBatch")];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=defs");
    println!("cargo:rerun-if-changed=build.rs");
    let grpc = env::var_os("CARGO_FEATURE_GRPC").is_some();
    tonic_prost_build::configure()
        .build_client(grpc)
        .build_server(grpc)
        .config(|config| {
            config.bytes(["."]);
            for (item, batch) in LINK_ITEMS {
                config
                    .extern_path(format!(".im.v1.{item}"), format!("crate::link::wire::WireItem<crate::v1::{batch}>"));
            }
        })
        .compile_protos(&FILES, &["defs"])?;

    let mut compiler = protox::Compiler::new(["defs"])?;
    compiler.include_imports(true).open_files(FILES.map(|file| file.trim_start_matches("defs/")))?;
    let pool = compiler.descriptor_pool();
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("method_table.rs"), method_table(&pool)?)?;
    fs::write(out.join("body_shapes.rs"), body_shapes(&pool)?)?;
    fs::write(out.join("descriptors.bin"), compiler.encode_file_descriptor_set())?;
    Ok(())
}

/// The input of the `methods!` macro in `src/method.rs`.
fn method_table(pool: &DescriptorPool) -> Result<String, Box<dyn Error>> {
    let extension = pool.get_extension_by_name("im.v1.method").ok_or("options.proto has no `method` option")?;
    let mut rows = Vec::new();
    for service in pool.services().filter(|service| service.parent_file().name() != LINK_FILE) {
        for method in service.methods() {
            let options = method.options();
            if !options.has_extension(&extension) {
                return Err(format!("{} declares no number, audience and cost", method.full_name()).into());
            }
            let declared = options.get_extension(&extension);
            let declared = declared.as_message().ok_or("the `method` option is not a message")?;
            rows.push((number(declared, "number")?, row(service.name(), &method, declared)?));
        }
    }
    rows.sort();
    if let Some(pair) = rows.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        return Err(format!("two methods have the number {}", pair[0].0).into());
    }
    let mut out = String::from("methods! {\n");
    for (_, row) in rows {
        out.push_str(&row);
    }
    out.push_str("}\n");
    Ok(out)
}

fn row(service: &str, method: &MethodDescriptor, declared: &DynamicMessage) -> Result<String, Box<dyn Error>> {
    let full_name = method.full_name();
    let audience = declared.get_field_by_name("audience").ok_or("no audience field")?;
    let audience: Vec<i32> = audience.as_list().unwrap_or(&[]).iter().filter_map(Value::as_enum_number).collect();
    if audience.is_empty() {
        return Err(format!("{full_name} declares no audience").into());
    }
    let number = number(declared, "number")?;
    let cost = number_or(declared, "cost", 0);
    if number == 0 || cost == 0 {
        return Err(format!("{full_name} declares no number or no cost").into());
    }
    let names = audience
        .iter()
        .map(|value| match value {
            1 => Ok("Client"),
            2 => Ok("Service"),
            3 => Ok("Admin"),
            4 => Ok("Public"),
            other => Err(format!("{full_name} declares an audience that build.rs does not know: {other}")),
        })
        .collect::<Result<Vec<&str>, String>>()?;
    let constant = format!("{}{}", service.trim_end_matches("Service"), method.name());
    let mut out = String::new();
    writeln!(
        out,
        "    {constant} = {number}, \"{full_name}\", cost {cost}, audience [{}];",
        names.iter().map(|name| format!("Audience::{name}")).collect::<Vec<_>>().join(", ")
    )?;
    Ok(out)
}

fn number(message: &DynamicMessage, field: &str) -> Result<u32, Box<dyn Error>> {
    message
        .get_field_by_name(field)
        .and_then(|value| value.as_u32())
        .ok_or_else(|| format!("the `method` option has no {field}").into())
}

fn number_or(message: &DynamicMessage, field: &str, default: u32) -> u32 {
    message.get_field_by_name(field).and_then(|value| value.as_u32()).unwrap_or(default)
}

/// One `static` a message that a body can hold, for `src/body/shape.rs`.
fn body_shapes(pool: &DescriptorPool) -> Result<String, Box<dyn Error>> {
    let encoded_body = pool.get_extension_by_name("im.v1.encoded_body").ok_or("options.proto has no `encoded_body`")?;
    let mut found = vec![pool.get_message_by_name("im.v1.Body").ok_or("no message Body")?];
    let mut out = String::new();
    let mut done = 0;
    while let Some(message) = found.get(done).cloned() {
        done += 1;
        if message.oneofs().count() > 1 {
            return Err(
                format!("the check of bodies knows one oneof a message, {} has more", message.full_name()).into()
            );
        }
        writeln!(out, "pub(super) static {}: Shape = Shape {{", shape_name(&message))?;
        writeln!(out, "    message: \"{}\",\n    fields: &[", message.name())?;
        for field in message.fields() {
            let kind = shape_kind(&field, field.options().get_extension(&encoded_body).as_bool() == Some(true))?;
            if let Kind::Message(inner) = field.kind()
                && !found.contains(&inner)
            {
                found.push(inner);
            }
            writeln!(
                out,
                "        Field {{ number: {}, repeated: {}, one_of: {}, kind: {kind} }},",
                field.number(),
                field.is_list(),
                field.containing_oneof().is_some(),
            )?;
        }
        out.push_str("    ],\n};\n");
    }
    Ok(out)
}

fn shape_name(message: &MessageDescriptor) -> String {
    message.name().to_uppercase()
}

fn shape_kind(field: &FieldDescriptor, encoded_body: bool) -> Result<String, Box<dyn Error>> {
    let bytes_or_text = matches!(field.kind(), Kind::String | Kind::Bytes | Kind::Message(_));
    let four_bytes = matches!(field.kind(), Kind::Float | Kind::Fixed32 | Kind::Sfixed32);
    if four_bytes || field.number() > 63 || field.is_map() || (field.is_list() && !bytes_or_text) {
        return Err(format!("the check of bodies cannot follow {}", field.full_name()).into());
    }
    Ok(match field.kind() {
        Kind::Message(inner) => format!("Kind::Message(&{})", shape_name(&inner)),
        Kind::Bytes if encoded_body => "Kind::Body".to_owned(),
        Kind::Bytes => "Kind::Bytes".to_owned(),
        Kind::String => "Kind::Text".to_owned(),
        Kind::Double | Kind::Fixed64 | Kind::Sfixed64 => "Kind::Fixed64".to_owned(),
        _ => "Kind::Varint".to_owned(),
    })
}
