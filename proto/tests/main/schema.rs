//! The `.proto` files as data.

use std::collections::BTreeMap;

use prost::Message as _;
use prost_types::{DescriptorProto, FieldDescriptorProto, FileDescriptorSet, field_descriptor_proto::Type};

pub struct Schema {
    messages: BTreeMap<String, DescriptorProto>,
    /// Names and numbers of each enum's values.
    enums: BTreeMap<String, Vec<(String, i32)>>,
    /// Request and reply of each method, by `Service.Method`.
    methods: BTreeMap<String, (String, String)>,
    /// Messages of each file, in the order of the source.
    files: BTreeMap<String, Vec<String>>,
}

impl Schema {
    pub fn load() -> Self {
        let set = FileDescriptorSet::decode(im_proto::FILE_DESCRIPTOR_SET).expect("descriptors");
        let mut schema = Self {
            messages: BTreeMap::new(),
            enums: BTreeMap::new(),
            methods: BTreeMap::new(),
            files: BTreeMap::new(),
        };
        for file in set.file.into_iter().filter(|file| file.package() == "im.v1") {
            let names = file.message_type.iter().map(|message| message.name().to_owned()).collect();
            schema.files.insert(file.name().rsplit('/').next().expect("a name").to_owned(), names);
            for message in file.message_type {
                assert!(message.nested_type.is_empty() && message.enum_type.is_empty(), "nested: {}", message.name());
                schema.messages.insert(message.name().to_owned(), message);
            }
            for service in &file.service {
                for method in &service.method {
                    let short = |name: &str| name.rsplit('.').next().expect("a name").to_owned();
                    let name = format!("{}.{}", service.name(), method.name());
                    schema.methods.insert(name, (short(method.input_type()), short(method.output_type())));
                }
            }
            for list in file.enum_type {
                let values = list.value.iter().map(|value| (value.name().to_owned(), value.number())).collect();
                schema.enums.insert(list.name().to_owned(), values);
            }
        }
        schema
    }

    pub fn message(&self, name: &str) -> &DescriptorProto {
        self.messages.get(name).unwrap_or_else(|| panic!("no message {name}"))
    }

    pub fn method(&self, name: &str) -> &(String, String) {
        &self.methods[name]
    }

    pub fn message_names(&self) -> impl Iterator<Item = &str> {
        self.messages.keys().map(String::as_str)
    }

    pub fn messages_of(&self, file: &str) -> &[String] {
        &self.files[file]
    }

    /// The fields in the order in which they are encoded: by number, a oneof at its least number.
    pub fn slots(&self, message: &str) -> Vec<Slot<'_>> {
        let mut slots: Vec<Slot<'_>> = Vec::new();
        let mut fields: Vec<&FieldDescriptorProto> = self.message(message).field.iter().collect();
        fields.sort_by_key(|field| field.number());
        for field in fields {
            match (field.oneof_index, slots.iter_mut().find(|slot| slot.one_of == field.oneof_index)) {
                (Some(_), Some(slot)) => slot.members.push(field),
                _ => slots.push(Slot { one_of: field.oneof_index, members: vec![field] }),
            }
        }
        slots
    }

    pub fn enum_values(&self, name: &str) -> &[(String, i32)] {
        &self.enums[name]
    }
}

/// A field, or a oneof with its members.
pub struct Slot<'a> {
    pub one_of: Option<i32>,
    pub members: Vec<&'a FieldDescriptorProto>,
}

/// `.im.v1.Hello` → `Hello`.
pub fn type_name(field: &FieldDescriptorProto) -> &str {
    field.type_name().rsplit('.').next().expect("a name")
}

/// The type as SPEC.md writes it.
pub fn type_text(field: &FieldDescriptorProto) -> String {
    let repeated = if is_repeated(field) { "repeated " } else { "" };
    let name = match field.r#type() {
        Type::Message | Type::Enum => type_name(field).to_owned(),
        scalar => scalar.as_str_name().trim_start_matches("TYPE_").to_lowercase(),
    };
    format!("{repeated}{name}")
}

pub fn is_repeated(field: &FieldDescriptorProto) -> bool {
    field.label() == prost_types::field_descriptor_proto::Label::Repeated
}
