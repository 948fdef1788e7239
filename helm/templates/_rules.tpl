{{/* A number as Prometheus writes the bound of a bucket: 2 is 2.0. */}}
{{- define "baton.bound" -}}
{{- $text := toString . -}}
{{- ternary $text (printf "%s.0" $text) (contains "." $text) -}}
{{- end -}}

{{/* Share of requests whose latency was beyond the objective, over a window. */}}
{{- define "baton.missShare" -}}
(1 - sum(rate(baton_{{ .metric }}_seconds_bucket{ {{- .own }},le="{{ include "baton.bound" .bound }}"}[{{ .window }}])) / sum(rate(baton_{{ .metric }}_seconds_count{ {{- .own }}}[{{ .window }}])))
{{- end -}}

{{/* Rules of Prometheus. Routers have no `pool` label, workers and the controller do. */}}
{{- define "baton.rules" -}}
{{- $name := include "baton.fullname" . -}}
{{- $own := printf "cluster_name=\"%s\"" $name -}}
{{- $slo := .Values.monitoring.slo -}}
{{- $budget := subf 1 $slo.objective -}}
groups:
  - name: {{ $name }}.latency
    rules:
      {{- range $metric, $bound := dict "ttft" $slo.ttftSeconds "tpot" $slo.tpotSeconds }}
      {{- range $burn := list (list "Fast" "5m" "1h" 14.4 "critical" "2m") (list "Slow" "30m" "6h" 6 "warning" "15m") }}
      {{- $limit := mulf (index $burn 3) $budget }}
      - alert: Baton{{ title $metric }}Burns{{ index $burn 0 }}
        expr: >-
          {{ include "baton.missShare" (dict "metric" $metric "own" $own "bound" $bound "window" (index $burn 1)) }} > {{ $limit }}
          and
          {{ include "baton.missShare" (dict "metric" $metric "own" $own "bound" $bound "window" (index $burn 2)) }} > {{ $limit }}
        for: {{ index $burn 5 }}
        labels: {severity: {{ index $burn 4 }}}
        annotations:
          summary: "{{ upper $metric }} of {{ $name }} is beyond {{ $bound }} s for {{`{{ $value | humanizePercentage }}`}} of requests"
          description: >-
            At this rate the error budget of {{ mulf 100 $budget | printf "%.3g" }} % lasts {{ ternary "two days" "five days" (eq (index $burn 0) "Fast") }} of thirty.
            {{ ternary "See where TTFT goes: baton_ttft_stage_seconds. A long prefill_queue asks for more prefill workers." "Running sequences per decode worker or their free blocks say whether decode is too small." (eq $metric "ttft") }}
      {{- end }}
      {{- end }}
  - name: {{ $name }}.requests
    rules:
      - alert: BatonRequestsFail
        expr: >-
          sum(rate(baton_requests_total{ {{- $own }},outcome="error"}[5m]))
          / sum(rate(baton_requests_total{ {{- $own }}}[5m])) > 0.01
        for: 5m
        labels: {severity: critical}
        annotations:
          summary: "{{`{{ $value | humanizePercentage }}`}} of the requests to {{ $name }} end with an error"
          description: "The routers' logs name each cause; /admin/requests/ID shows the attempts of one."
      - alert: BatonRefuses
        expr: sum by (reason) (rate(baton_refusals_total{ {{- $own }},pool=""}[5m])) > 0.1
        for: 5m
        labels: {severity: warning}
        annotations:
          summary: "Routers of {{ $name }} refuse {{`{{ $value | humanize }}`}} requests a second: {{`{{ $labels.reason }}`}}"
          description: "queue_full, queue_timeout and no_capacity mean that the pools are too small for the load."
      - alert: BatonRecoversOften
        expr: sum by (cause) (rate(baton_recoveries_total{ {{- $own }}}[10m])) > 0.2
        for: 10m
        labels: {severity: warning}
        annotations:
          summary: "{{ $name }} starts {{`{{ $value | humanize }}`}} attempts a second again: {{`{{ $labels.cause }}`}}"
          description: "Clients see pauses, no errors. Look for lost or stalled workers."
      - alert: BatonHandoffsFail
        expr: sum by (pool, cause) (rate(baton_handoff_failures_total{ {{- $own }}}[5m])) > 0.05
        for: 5m
        labels: {severity: warning}
        annotations:
          summary: "Hand-offs of {{ $name }} fail: {{`{{ $labels.cause }}`}}, {{`{{ $value | humanize }}`}} a second"
          description: "The data plane between prefill and decode is in trouble; requests are recovered at the cost of time."
  - name: {{ $name }}.workers
    rules:
      - alert: BatonPoolEmpty
        expr: baton_pool_ready_replicas{ {{- $own }}} == 0 and baton_pool_desired_replicas{ {{- $own }}} > 0
        for: 2m
        labels: {severity: critical}
        annotations:
          summary: "No {{`{{ $labels.pool }}`}} worker of {{ $name }} serves"
          description: "`baton status` in the head pod says why the last start failed."
      - alert: BatonPoolBelowDesired
        expr: baton_pool_ready_replicas{ {{- $own }}} < baton_pool_desired_replicas{ {{- $own }}}
        for: {{ add 600 (int .Values.controller.startSeconds) }}s
        labels: {severity: warning}
        annotations:
          summary: "{{`{{ $labels.pool }}`}} of {{ $name }} has had only {{`{{ $value }}`}} workers for long"
          description: "Pending pods (no free cards?), workers that fail to start, or a pool that cannot be reached."
      - alert: BatonQuarantineGrows
        expr: >-
          min_over_time(baton_blocks{ {{- $own }},state="quarantined"}[15m]) > 0
          and delta(baton_blocks{ {{- $own }},state="quarantined"}[15m]) > 0
        for: 5m
        labels: {severity: warning}
        annotations:
          summary: "{{`{{ $labels.pod }}`}} of {{ $name }} holds {{`{{ $value }}`}} blocks in quarantine, and more come"
          description: "A writer has not answered its fence. Resume or delete that prefill pod; its blocks are then freed."
      - alert: BatonWorkerStalls
        expr: baton_healthy{ {{- $own }}} == 0
        for: 1m
        labels: {severity: critical}
        annotations:
          summary: "{{`{{ $labels.pod }}`}} of {{ $name }} makes no progress"
          description: "The controller kills a worker that stays so. Its log shows the last step."
      - alert: BatonRouterMissesWorkers
        expr: >-
          sum by (pod) (baton_router_workers{ {{- $own }},state="alive"})
          < on () group_left () sum(baton_pool_ready_replicas{ {{- $own }}})
        for: 5m
        labels: {severity: warning}
        annotations:
          summary: "Router {{`{{ $labels.pod }}`}} of {{ $name }} reaches only {{`{{ $value }}`}} of the workers that serve"
          description: "A network policy, a partition, or a membership feed that does not arrive."
      - alert: BatonControllerSilent
        expr: absent(baton_pool_desired_replicas{ {{- $own }}})
        for: 10m
        labels: {severity: warning}
        annotations:
          summary: "The controller of {{ $name }} is not heard"
          description: "Requests are still served; lost workers are not replaced and pools keep their size."
{{- end -}}
