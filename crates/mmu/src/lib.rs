//! The guest page-table walker and the nested, shadow and direct paths to the host's page.
