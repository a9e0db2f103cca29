//! The parameters of KVM's modules. A machine with KVM sets them for everybody, in files below
//! `/sys/module`; here each process sets its own, in its environment.

use std::sync::OnceLock;

/// What a parameter is, and its value where nothing else was asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Default {
    Flag(bool),
    Number(u32),
}

/// A parameter that the environment may set.
#[derive(Debug)]
pub(crate) struct Parameter {
    /// The environment variable.
    variable: &'static str,
    default: Default,
    /// The flag without which this one means nothing.
    needs: Option<&'static Parameter>,
    /// What the file holds.
    text: OnceLock<String>,
}

/// Whether huge leaves are split when dirty logging begins.
pub(crate) static EAGER_PAGE_SPLIT: Parameter = Parameter::flag("TWOFOLD_EAGER_PAGE_SPLIT", true);
/// Whether huge pages are kept from being executable.
pub(crate) static NX_HUGE_PAGES: Parameter = Parameter::flag("TWOFOLD_NX_HUGE_PAGES", false);
/// One in how many split pages becomes huge again in each period.
pub(crate) static NX_RECOVERY_RATIO: Parameter =
    Parameter::number("TWOFOLD_NX_HUGE_PAGES_RECOVERY_RATIO", 60);
/// Milliseconds of a period; 0: so many that all are recovered in an hour.
pub(crate) static NX_RECOVERY_PERIOD: Parameter =
    Parameter::number("TWOFOLD_NX_HUGE_PAGES_RECOVERY_PERIOD_MS", 0);
/// Whether EPT has accessed and dirty bits.
pub(crate) static EPTAD: Parameter = Parameter::flag("TWOFOLD_EPTAD", true);
/// Whether processors log the pages that they write. Needs the dirty bits.
pub(crate) static PML: Parameter = Parameter {
    variable: "TWOFOLD_PML",
    default: Default::Flag(true),
    needs: Some(&EPTAD),
    text: OnceLock::new(),
};
/// Whether #VE is switched on for normal guests, to prove that none is ever raised.
pub(crate) static PROVE_VE: Parameter = Parameter::flag("TWOFOLD_PROVE_VE", false);

impl Parameter {
    const fn flag(variable: &'static str, default: bool) -> Self {
        Self {
            variable,
            default: Default::Flag(default),
            needs: None,
            text: OnceLock::new(),
        }
    }

    const fn number(variable: &'static str, default: u32) -> Self {
        Self {
            variable,
            default: Default::Number(default),
            needs: None,
            text: OnceLock::new(),
        }
    }

    /// Whether the flag is set. A number is one if it is not 0.
    pub(crate) fn is_on(&self) -> bool {
        !matches!(self.text(), "N\n" | "0\n")
    }

    /// The number. A flag is 0 or 1.
    pub(crate) fn get(&self) -> u32 {
        self.text()
            .trim_end()
            .parse()
            .unwrap_or(self.is_on().into())
    }

    /// What the parameter's file holds.
    pub(crate) fn text(&self) -> &str {
        self.text.get_or_init(|| {
            if self.needs.is_some_and(|needs| !needs.is_on()) {
                return "N\n".into();
            }
            let value = std::env::var(self.variable).ok();
            self.read(value.as_deref())
        })
    }

    fn read(&self, value: Option<&str>) -> String {
        let value = value.filter(|value| !value.is_empty());
        let understood = value.and_then(|value| match self.default {
            Default::Flag(_) => match value {
                "1" | "Y" | "y" | "on" => Some("Y\n".into()),
                "0" | "N" | "n" | "off" => Some("N\n".into()),
                _ => None,
            },
            Default::Number(_) => value
                .parse::<u32>()
                .ok()
                .map(|number| format!("{number}\n")),
        });
        understood.unwrap_or_else(|| {
            if let Some(value) = value {
                tracing::warn!(
                    variable = self.variable,
                    value,
                    "not a value; taking the default"
                );
            }
            match self.default {
                Default::Flag(true) => "Y\n".into(),
                Default::Flag(false) => "N\n".into(),
                Default::Number(number) => format!("{number}\n"),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_take_the_values_that_the_kernel_takes() {
        for (value, text) in [
            (None, "Y\n"),
            (Some(""), "Y\n"),
            (Some("1"), "Y\n"),
            (Some("off"), "N\n"),
            (Some("N"), "N\n"),
            (Some("perhaps"), "Y\n"),
        ] {
            assert_eq!(EAGER_PAGE_SPLIT.read(value), text, "{value:?}");
        }
        for (value, text) in [(None, "60\n"), (Some("0"), "0\n"), (Some("-1"), "60\n")] {
            assert_eq!(NX_RECOVERY_RATIO.read(value), text, "{value:?}");
        }
        assert_eq!(NX_RECOVERY_RATIO.get(), 60);
        assert!(!NX_HUGE_PAGES.is_on());
        assert_eq!(PML.get(), 1);
    }
}
