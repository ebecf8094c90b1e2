//! Header cluster: all that stands in an image's first cluster, taken apart and put together again: fields, extensions,
//! the name of the backing file. It owns their order; what it does not know is kept. With no request in flight.

use super::channel::Channel;
use super::header::{EXTENSION_END, Header, HeaderSector};
use crate::error::{OpenError, OpenResult};

/// The most bytes of a name.
const NAME_BYTES_MAX: usize = 1023;
/// How long the fields of version 2 are.
const V2_FIELDS: usize = 72;

/// See the file's head.
pub(super) struct HeaderCluster {
    /// As long as they are.
    fields: Vec<u8>,
    extensions: Vec<(u32, Vec<u8>)>,
    backing: Vec<u8>,
    size: usize,
}

impl HeaderCluster {
    /// Takes a header apart that has been read before.
    pub(super) fn parse(cluster: &[u8]) -> OpenResult<Self> {
        let number =
            |at: usize| cluster.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map(u32::from_be_bytes);
        let cut_off = || OpenError::new("the header is cut off");
        let length = if number(4) == Some(3) { number(100).ok_or_else(cut_off)? as usize } else { V2_FIELDS };
        let fields = cluster.get(..length).ok_or_else(cut_off)?.to_vec();
        let mut extensions = Vec::new();
        let mut at = length;
        while let (Some(kind), Some(bytes)) = (number(at), number(at + 4)) {
            let data = cluster.get(at + 8..).and_then(|rest| rest.get(..bytes as usize));
            let Some(data) = data.filter(|_| kind != EXTENSION_END) else { break };
            extensions.push((kind, data.to_vec()));
            at += 8 + (bytes as usize).next_multiple_of(8);
        }
        let place = cluster.get(8..16).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_be_bytes);
        let name = usize::try_from(place).ok().filter(|place| *place != 0);
        let name = name.and_then(|place| cluster.get(place..)?.get(..number(16)? as usize));
        Ok(Self { fields, extensions, backing: name.unwrap_or(&[]).to_vec(), size: cluster.len() })
    }

    /// Replaces an extension, or takes it out.
    pub(super) fn set_extension(&mut self, kind: u32, data: Option<Vec<u8>>) {
        let found = self.extensions.iter().position(|(known, _)| *known == kind);
        match (found, data) {
            (Some(at), Some(data)) => self.extensions[at].1 = data,
            (Some(at), None) => drop(self.extensions.remove(at)),
            (None, Some(data)) => self.extensions.insert(0, (kind, data)),
            (None, None) => {}
        }
    }

    /// An empty name: there is no backing file.
    pub(super) fn set_backing(&mut self, name: &str) {
        self.backing = name.as_bytes().to_vec();
    }

    /// Fields of version 3 from byte 72 on; version 2 has none.
    pub(super) fn set_version(&mut self, version: u32, fields: &[u8]) {
        self.fields.truncate(V2_FIELDS);
        self.fields.extend(fields);
        self.fields[4..8].copy_from_slice(&version.to_be_bytes());
    }

    /// Puts a number of 64 bits into the fields, if they are so long.
    pub(super) fn put(&mut self, at: usize, number: u64) {
        if let Some(place) = self.fields.get_mut(at..at + 8) {
            place.copy_from_slice(&number.to_be_bytes());
        }
    }

    pub(super) fn put_short(&mut self, at: usize, number: u32) {
        if let Some(place) = self.fields.get_mut(at..at + 4) {
            place.copy_from_slice(&number.to_be_bytes());
        }
    }

    /// The whole cluster.
    pub(super) fn bytes(&self) -> OpenResult<Vec<u8>> {
        let mut bytes = self.fields.clone();
        let end = (EXTENSION_END, Vec::new());
        for (kind, data) in self.extensions.iter().chain([&end]) {
            bytes.extend(kind.to_be_bytes());
            bytes.extend((data.len() as u32).to_be_bytes());
            bytes.extend(data);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        }
        let place = if self.backing.is_empty() { 0 } else { bytes.len() as u64 };
        bytes.extend(&self.backing);
        if self.backing.len() > NAME_BYTES_MAX || bytes.len() > self.size {
            let most = self.size;
            return Err(OpenError(format!("what the header has to say does not fit into its {most} bytes")));
        }
        bytes.resize(self.size, 0);
        bytes[8..16].copy_from_slice(&place.to_be_bytes());
        bytes[16..20].copy_from_slice(&(self.backing.len() as u32).to_be_bytes());
        Ok(bytes)
    }
}

impl Channel {
    /// Writes the header's cluster anew, stable.
    ///
    /// # Errors
    /// It does not fit, or contradicts itself, or I/O failed; the header says what it said before, or the image is not
    /// used any more.
    pub(super) async fn edit_header(&self, edit: impl FnOnce(&mut HeaderCluster) -> OpenResult) -> OpenResult {
        let failed = |e| OpenError(format!("the header cannot be changed: {e}"));
        let before = self.read_bytes(0, self.image.geometry.cluster_size()).await.map_err(failed)?;
        let mut cluster = HeaderCluster::parse(&before)?;
        edit(&mut cluster)?;
        let after = cluster.bytes()?;
        // Whoever opens it next must be able to.
        let header = Header::parse(&after)?;
        let written = async |bytes: &[u8]| {
            self.write_bytes(0, bytes).await?;
            self.file.flush().await
        };
        if let Err(error) = written(&after).await {
            if written(&before).await.is_err() {
                self.image.broken.store(true, std::sync::atomic::Ordering::Relaxed);
                tracing::error!("node \"{}\": the header cannot be written; it is not used any more", self.image.name);
            }
            return Err(failed(error));
        }
        let mut state = self.image.lock();
        state.header = header;
        state.header_sector = HeaderSector::new(&after);
        Ok(())
    }
}
