//! The part of `tonic-prost-build` that this workspace and etcd-client's build script call, with protox (pure Rust)
//! in place of an external `protoc`. `[patch.crates-io]` of the workspace puts it where the real crate would be.

use std::{io, path::Path};

use proc_macro2::TokenStream;
use prost_build::Config;
use quote::{ToTokens, quote};
use tonic_build::CodeGenBuilder;

const CODEC: &str = "tonic_prost::ProstCodec";

pub fn configure() -> Builder {
    Builder { client: true, server: true, config: Config::new() }
}

pub struct Builder {
    client: bool,
    server: bool,
    config: Config,
}

impl Builder {
    pub fn build_client(mut self, enable: bool) -> Self {
        self.client = enable;
        self
    }

    pub fn build_server(mut self, enable: bool) -> Self {
        self.server = enable;
        self
    }

    /// Any option of prost's own configuration.
    pub fn config(mut self, set: impl FnOnce(&mut Config)) -> Self {
        set(&mut self.config);
        self
    }

    pub fn compile_protos<P: AsRef<Path>>(mut self, protos: &[P], includes: &[P]) -> io::Result<()> {
        let files = protox::compile(protos, includes).map_err(io::Error::other)?;
        self.config.service_generator(Box::new(Generator { client: self.client, server: self.server }));
        self.config.compile_fds(files)
    }
}

struct Generator {
    client: bool,
    server: bool,
}

impl prost_build::ServiceGenerator for Generator {
    fn generate(&mut self, service: prost_build::Service, out: &mut String) {
        let methods = service.methods.iter().cloned().map(Method).collect();
        let service = Service { service, methods };
        let mut builder = CodeGenBuilder::new();
        builder.emit_package(true).build_transport(true);
        let mut tokens = TokenStream::new();
        if self.client {
            tokens.extend(builder.generate_client(&service, "super"));
        }
        if self.server {
            tokens.extend(builder.generate_server(&service, "super"));
        }
        out.push_str(&prettyplease::unparse(&syn::parse2(tokens).expect("tonic writes valid Rust")));
    }
}

struct Service {
    service: prost_build::Service,
    methods: Vec<Method>,
}

struct Method(prost_build::Method);

impl tonic_build::Service for Service {
    type Method = Method;
    type Comment = String;

    fn name(&self) -> &str {
        &self.service.name
    }

    fn package(&self) -> &str {
        &self.service.package
    }

    fn identifier(&self) -> &str {
        &self.service.proto_name
    }

    fn methods(&self) -> &[Method] {
        &self.methods
    }

    fn comment(&self) -> &[String] {
        &self.service.comments.leading
    }
}

impl tonic_build::Method for Method {
    type Comment = String;

    fn name(&self) -> &str {
        &self.0.name
    }

    fn identifier(&self) -> &str {
        &self.0.proto_name
    }

    fn codec_path(&self) -> &str {
        CODEC
    }

    fn client_streaming(&self) -> bool {
        self.0.client_streaming
    }

    fn server_streaming(&self) -> bool {
        self.0.server_streaming
    }

    fn comment(&self) -> &[String] {
        &self.0.comments.leading
    }

    fn request_response_name(&self, parent: &str, _well_known: bool) -> (TokenStream, TokenStream) {
        (rust_type(&self.0.input_type, parent), rust_type(&self.0.output_type, parent))
    }
}

/// A type as prost names it inside the service's package, seen from the generated module one level below.
fn rust_type(name: &str, parent: &str) -> TokenStream {
    if name == "()" {
        return quote!(());
    }
    let absolute = name.starts_with("::") || name.starts_with("crate::");
    let path = if absolute { name.to_owned() } else { format!("{parent}::{name}") };
    syn::parse_str::<syn::Path>(&path).expect("prost names types by path").to_token_stream()
}
