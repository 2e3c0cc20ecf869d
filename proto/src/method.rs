//! The table of api methods, generated from the `.proto` files: number, name, cost and audience, each written once.

/// Who may call a method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Audience {
    /// A user's token.
    Client,
    /// A service's token.
    Service,
    /// An operator's token.
    Admin,
    /// Anybody, also without a token.
    Public,
}

macro_rules! methods {
    ($($name:ident = $number:literal, $full_name:literal, cost $cost:literal, audience [$($audience:expr),*];)*) => {
        /// An api method, served alike over `Call` and over gRPC.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Method {
            $(
                #[doc = $full_name]
                $name,
            )*
        }

        impl Method {
            /// All methods in the order of their numbers.
            pub const ALL: &'static [Method] = &[$(Method::$name),*];

            /// The number in `Call.method`.
            pub const fn number(self) -> u32 {
                match self { $(Method::$name => $number,)* }
            }

            /// The protobuf name, for example `im.v1.MessageService.History`.
            pub const fn full_name(self) -> &'static str {
                match self { $(Method::$name => $full_name,)* }
            }

            /// What a call takes from the caller's rate limit.
            pub const fn cost(self) -> u32 {
                match self { $(Method::$name => $cost,)* }
            }

            /// Who may call it.
            pub const fn audience(self) -> &'static [Audience] {
                match self { $(Method::$name => &[$($audience),*],)* }
            }

            /// The method of a number, if there is one.
            pub const fn from_number(number: u32) -> Option<Method> {
                match number { $($number => Some(Method::$name),)* _ => None }
            }
        }
    };
}

include!(concat!(env!("OUT_DIR"), "/method_table.rs"));
