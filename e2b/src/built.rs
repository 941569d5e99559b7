//! Built templates: looked up by name, and reopened as checkpoints after a restart of the
//! supervisor.

use clade_api::{ClientError, OpenRequest, ProblemKind, SavedSource};

use crate::error::{Answer, GatewayError};
use crate::gateway::Gateway;
use crate::rules::checkpoint_name;
use crate::templates::{Template, TemplateError};

impl Gateway {
    /// Returns the built template of a name or an id.
    pub(crate) fn built(&self, name: &str) -> Option<Template> {
        match self.0.templates.as_ref()?.find(checkpoint_name(name)) {
            Ok(template) => Some(template),
            Err(TemplateError::NotFound(_)) => None,
            Err(error) => {
                tracing::warn!(%error, name, "a template is not found");
                None
            }
        }
    }

    /// Returns all built templates.
    pub(crate) fn all_built(&self) -> Answer<Vec<Template>> {
        let all = self.0.templates.as_ref().map_or(Ok(Vec::new()), crate::templates::TemplateStore::list);
        all.map_err(|error| GatewayError::internal(error.to_string()))
    }

    /// Makes the checkpoint of a template again, from its snapshot.
    pub(crate) async fn reopen(&self, template: &Template) -> Answer<()> {
        let Some(store) = &self.0.templates else { return Err(GatewayError::no_template(&template.name)) };
        // One at a time: the others then find it.
        let _turn = self.0.opening.lock().await;
        let dir = store.snapshot(&template.id);
        let saved = SavedSource { dir, load: Default::default(), overlays: None, parents: Vec::new() };
        let request = OpenRequest { saved, name: Some(template.id.clone()) };
        match self.0.supervisor.open_checkpoint(request).await {
            Ok(_) => Ok(()),
            // Another process was quicker.
            Err(ClientError::Refused { problem, .. })
                if ProblemKind::of_urn(&problem.kind) == Some(ProblemKind::NameTaken) =>
            {
                Ok(())
            }
            Err(error) => {
                let why = GatewayError::from(error);
                let message =
                    format!("the snapshot of the template {:?} does not open: {}", template.name, why.message);
                Err(GatewayError { message, ..why })
            }
        }
    }
}
