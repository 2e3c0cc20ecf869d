//! The closed set of backends as one value.

use bytes::Bytes;
use im_proto::{ConversationId, InstanceId};

use crate::{
    Directory, Embedded, Faulty, Insistent, Inventory, Memory, MessageLog, Scylla, SimHandle,
    model::{
        AppendDone, AppendRequest, BucketId, Fence, Page, RowKey, StateRow, StateWrite, StoreError, StoredRow, Table,
    },
};

/// A store of any kind. A clone is another handle of the same store and costs a reference count.
#[derive(Clone, Debug)]
pub enum Store {
    Memory(Memory),
    Embedded(Embedded),
    /// One client's view of a simulated cluster.
    Sim(SimHandle),
    Faulty(Faulty),
    Insistent(Insistent),
    /// ScyllaDB or Cassandra.
    Scylla(Scylla),
}

impl From<Memory> for Store {
    fn from(store: Memory) -> Self {
        Self::Memory(store)
    }
}

impl From<Embedded> for Store {
    fn from(store: Embedded) -> Self {
        Self::Embedded(store)
    }
}

impl From<SimHandle> for Store {
    fn from(store: SimHandle) -> Self {
        Self::Sim(store)
    }
}

impl From<Faulty> for Store {
    fn from(store: Faulty) -> Self {
        Self::Faulty(store)
    }
}

impl From<Insistent> for Store {
    fn from(store: Insistent) -> Self {
        Self::Insistent(store)
    }
}

impl From<Scylla> for Store {
    fn from(store: Scylla) -> Self {
        Self::Scylla(store)
    }
}

/// Calls the same method of whichever backend it is.
macro_rules! delegate {
    ($self:ident, $store:ident => $call:expr) => {
        match $self {
            Self::Memory($store) => $call,
            Self::Embedded($store) => $call,
            Self::Sim($store) => $call,
            Self::Faulty($store) => $call,
            Self::Insistent($store) => $call,
            Self::Scylla($store) => $call,
        }
    };
}

impl MessageLog for Store {
    fn submit(&self, requests: Vec<AppendRequest>, done: AppendDone) {
        delegate!(self, store => store.submit(requests, done))
    }

    async fn read_tail(&self, conversation: ConversationId, bucket: BucketId) -> Result<Vec<StoredRow>, StoreError> {
        delegate!(self, store => store.read_tail(conversation, bucket).await)
    }

    async fn read_range(
        &self,
        conversation: ConversationId,
        from: u64,
        to: u64,
        limit: usize,
    ) -> Result<Vec<StoredRow>, StoreError> {
        delegate!(self, store => store.read_range(conversation, from, to, limit).await)
    }

    async fn read_keys(&self, conversation: ConversationId, from: u64, to: u64) -> Result<Vec<RowKey>, StoreError> {
        delegate!(self, store => store.read_keys(conversation, from, to).await)
    }

    async fn write_fences(&self, instances: &[InstanceId]) -> Result<(), StoreError> {
        delegate!(self, store => store.write_fences(instances).await)
    }

    async fn read_fence(&self, instance: &InstanceId) -> Result<Fence, StoreError> {
        delegate!(self, store => store.read_fence(instance).await)
    }

    async fn raise_generation(&self, generation: u64) -> Result<(), StoreError> {
        delegate!(self, store => store.raise_generation(generation).await)
    }
}

impl Directory for Store {
    async fn write(&self, writes: Vec<StateWrite>) -> Result<(), StoreError> {
        delegate!(self, store => store.write(writes).await)
    }

    async fn read(&self, table: Table, partition: &[u8], key: &[u8]) -> Result<Option<StateRow>, StoreError> {
        delegate!(self, store => store.read(table, partition, key).await)
    }

    async fn scan(
        &self,
        table: Table,
        partition: &[u8],
        after: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<StateRow>, StoreError> {
        delegate!(self, store => store.scan(table, partition, after, limit).await)
    }
}

impl Inventory for Store {
    async fn list_buckets(
        &self,
        from: Option<Bytes>,
        limit: usize,
    ) -> Result<Page<(ConversationId, BucketId)>, StoreError> {
        delegate!(self, store => store.list_buckets(from, limit).await)
    }

    async fn list_partitions(&self, from: Option<Bytes>, limit: usize) -> Result<Page<(Table, Bytes)>, StoreError> {
        delegate!(self, store => store.list_partitions(from, limit).await)
    }
}
