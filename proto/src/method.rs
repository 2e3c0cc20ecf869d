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

impl Audience {
    /// The word for tables and logs.
    pub const fn name(self) -> &'static str {
        match self {
            Audience::Client => "client",
            Audience::Service => "service",
            Audience::Admin => "admin",
            Audience::Public => "public",
        }
    }
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

impl Method {
    /// Whether callers of this kind may call it.
    pub fn allows(self, audience: Audience) -> bool {
        self.audience().contains(&audience) || self.audience().contains(&Audience::Public)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_is_found_by_its_number_and_declares_audience_and_cost() {
        for method in Method::ALL {
            assert_eq!(Method::from_number(method.number()), Some(*method));
            assert!(!method.audience().is_empty() && method.cost() > 0, "{}", method.full_name());
        }
        assert_eq!(Method::from_number(0), None);
    }

    #[test]
    fn a_method_is_open_to_its_audience_and_a_public_one_to_all() {
        assert!(Method::MessageHistory.allows(Audience::Client));
        assert!(!Method::MessageHistory.allows(Audience::Service));
        assert!(Method::PlacementLocate.allows(Audience::Admin));
    }
}
