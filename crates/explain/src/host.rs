//! The last step: which frame of the host's memory a host virtual address is.

use std::path::PathBuf;

use addr::{Address, Frame, Hpa, Hva, PageSize};
use memory::pagemap::{FrameNumber, PageFlags, PageState, Pagemap, PagemapError};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::hex;

/// What the host's page tables say about one byte of the monitor's memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostSide {
    /// The byte.
    #[serde(with = "hex")]
    #[schema(value_type = String)]
    pub hva: Hva,
    /// The file behind the mapping (a memfd is one), if any.
    #[schema(value_type = Option<String>)]
    pub file: Option<PathBuf>,
    /// Where in that file the byte is.
    #[serde(with = "hex::option")]
    #[schema(value_type = Option<String>)]
    pub file_offset: Option<u64>,
    /// `present`, `present, frame hidden`, `swapped`, `absent` or `not mapped`.
    pub state: String,
    /// The byte's place in the host's memory, where the host tells it.
    #[serde(with = "hex::option")]
    #[schema(value_type = Option<String>)]
    pub hpa: Option<Hpa>,
    /// Whether the frame belongs to a huge page, where the host tells it.
    pub huge: Option<bool>,
    /// The kernel's flags of the frame, where the host tells them.
    pub flags: Option<String>,
}

impl HostSide {
    /// Looks one byte up.
    pub fn read(pagemap: &Pagemap, hva: Hva) -> Result<Self, PagemapError> {
        let mapping = pagemap.mapping(hva)?;
        let page = pagemap.look_up(hva)?;
        let hpa = page.entry.frame().map(|frame| {
            frame
                .start()
                .wrapping_add(hva.page_offset(PageSize::Size4K))
        });
        Ok(Self {
            hva,
            file: mapping.as_ref().and_then(|m| m.path.clone()),
            file_offset: mapping.as_ref().and_then(|m| m.file_offset(hva)),
            state: String::from(match page.entry.state {
                _ if mapping.is_none() => "not mapped",
                PageState::Present(FrameNumber::Known(_)) => "present",
                PageState::Present(FrameNumber::Hidden) => "present, frame hidden",
                PageState::Swapped { .. } => "swapped",
                PageState::Absent => "absent",
            }),
            hpa,
            huge: page.is_huge().or_else(|| pagemap.is_huge(hva)),
            flags: page.flags.map(flag_words),
        })
    }
}

fn flag_words(flags: PageFlags) -> String {
    let names = flags.iter_names().map(|(name, _)| name.to_lowercase());
    names.collect::<Vec<_>>().join(" ")
}
