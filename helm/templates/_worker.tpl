{{/* One worker group of the RayCluster. Takes `root` and `pool`. Never says `replicas`: see docs/operations.md. */}}
{{- define "baton.workerGroup" -}}
{{- $values := .root.Values -}}
{{- $p := index $values .pool -}}
{{- $type := $values.accelerator.type -}}
{{- $ray := dict (include "baton.rayResource" .) 1 -}}
{{- if eq $type "ascend" -}}{{- $_ := set $ray "NPU" (int $p.cards) -}}{{- end -}}
groupName: {{ .pool }}
{{- if $values.autoscaling.enabled }}
minReplicas: {{ int $p.minReplicas }}
maxReplicas: {{ add (int $p.maxReplicas) 1 }} # a rollout starts one worker before it drains another
idleTimeoutSeconds: {{ int $p.idleSeconds }}
{{- else }}
replicas: {{ int $p.maxReplicas }}
minReplicas: {{ int $p.maxReplicas }}
maxReplicas: {{ int $p.maxReplicas }}
{{- end }}
rayStartParams:
  resources: {{ printf "\"%s\"" ($ray | toJson | replace "\"" "\\\"") | squote }}
  {{- if eq $type "gpu" }}
  num-gpus: {{ int $p.cards | toString | quote }}
  {{- end }}
template:
  metadata:
    labels:
      {{- include "baton.labels" .root | nindent 6 }}
      app.kubernetes.io/component: {{ .pool }}
      {{- with $values.scheduler.queue }}
      volcano.sh/queue-name: {{ . }}
      {{- end }}
      {{- if eq $type "ascend" }}
      ring-controller.atlas: ascend-910
      {{- end }}
      {{- with $p.podLabels }}{{- toYaml . | nindent 6 }}{{- end }}
    {{- with $p.podAnnotations }}
    annotations: {{- toYaml . | nindent 6 }}
    {{- end }}
  spec: {{- include "baton.workerSpec" . | nindent 4 }}
{{- end -}}

{{/* The name of a pool's Ray resource. It follows from the pods' specification, so that workers started after an upgrade
fit only pods of the new kind, and those of the old kind empty themselves. */}}
{{- define "baton.rayResource" -}}
baton_{{ .pool }}_{{ include "baton.workerSpec" . | sha256sum | trunc 8 }}
{{- end -}}

{{/* A worker's pod. Takes `root` and `pool`. */}}
{{- define "baton.workerSpec" -}}
{{- $values := .root.Values -}}
{{- $p := index $values .pool -}}
serviceAccountName: {{ include "baton.fullname" .root }}
automountServiceAccountToken: false
terminationGracePeriodSeconds: {{ add (int $values.worker.drainSeconds) 60 }}
securityContext: {{- toYaml $values.worker.podSecurityContext | nindent 2 }}
{{- with $values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- if $values.worker.hostNetwork }}
hostNetwork: true
dnsPolicy: ClusterFirstWithHostNet
{{- end }}
{{- if $values.worker.hostIPC }}
hostIPC: true
{{- end }}
{{- with $values.accelerator.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with $values.scheduler.name }}
schedulerName: {{ . }}
{{- end }}
{{- include "baton.placement" $p | nindent 0 }}
initContainers:
  {{- include "baton.modelInit" (dict "root" .root "weights" true) | nindent 2 }}
  {{- if $values.worker.preflight }}
  - name: preflight
    {{- include "baton.container" .root | nindent 4 }}
    command: [baton, preflight, --config, /etc/baton/config.toml, --role, {{ .pool }}, --set, worker.host=$(BATON_HOST)]
    resources: {{- include "baton.workerResources" (dict "values" $values "pool" $p) | nindent 6 }}
    env:
      {{- include "baton.env" .root | nindent 6 }}
      - name: BATON_HOST
        valueFrom: {fieldRef: {fieldPath: status.podIP}}
    volumeMounts:
      {{- include "baton.volumeMounts" .root | nindent 6 }}
      {{- include "baton.modelMount" .root | nindent 6 }}
      - {name: shm, mountPath: /dev/shm}
      {{- include "baton.driverMounts" .root | nindent 6 }}
  {{- end }}
containers:
  - name: ray-worker
    {{- include "baton.container" .root | nindent 4 }}
    workingDir: /var/lib/baton
    resources: {{- include "baton.workerResources" (dict "values" $values "pool" $p) | nindent 6 }}
    ports:
      - {name: request, containerPort: {{ int $values.worker.ports.request }}}
      - {name: control, containerPort: {{ int $values.worker.ports.control }}}
      - {name: baton-metrics, containerPort: {{ int $values.worker.ports.metrics }}}
    env:
      {{- include "baton.env" .root | nindent 6 }}
      - name: BATON_HOST
        valueFrom: {fieldRef: {fieldPath: status.podIP}}
      {{- range $name, $value := $p.env }}
      - {name: {{ $name }}, value: {{ $value | toString | quote }}}
      {{- end }}
    lifecycle:
      preStop:
        exec:
          command:
            - /bin/sh
            - -c
            - >-
              exec python -m deploy.kube leave --metrics "http://$BATON_HOST:{{ int $values.worker.ports.metrics }}/metrics"
              --controller {{ include "baton.control" .root }} --timeout {{ add (int $values.worker.drainSeconds) 30 }}
    volumeMounts:
      {{- include "baton.volumeMounts" .root | nindent 6 }}
      {{- include "baton.modelMount" .root | nindent 6 }}
      - {name: shm, mountPath: /dev/shm}
      {{- include "baton.driverMounts" .root | nindent 6 }}
      {{- with $values.worker.extraVolumeMounts }}{{- toYaml . | nindent 6 }}{{- end }}
volumes:
  {{- include "baton.volumes" .root | nindent 2 }}
  {{- include "baton.modelVolume" .root | nindent 2 }}
  - {name: shm, emptyDir: {medium: Memory, sizeLimit: {{ $p.shm }}}}
  {{- include "baton.driverVolumes" .root | nindent 2 }}
  {{- with $values.worker.extraVolumes }}{{- toYaml . | nindent 2 }}{{- end }}
{{- end -}}

{{/* The pool's resources with its cards. */}}
{{- define "baton.workerResources" -}}
{{- $resources := deepCopy .pool.resources -}}
{{- if gt (int .pool.cards) 0 -}}
{{- range $part := list "requests" "limits" -}}
{{- $_ := set $resources $part (merge (dict $.values.accelerator.resource (int $.pool.cards | toString)) (index $resources $part | default dict)) -}}
{{- end -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{- define "baton.driverMounts" -}}
{{- if .Values.accelerator.hccnConf | and (eq .Values.accelerator.type "ascend") }}
- {name: hccn-conf, mountPath: /etc/hccn.conf, readOnly: true}
{{- end }}
{{- if and .Values.accelerator.driverMounts (eq .Values.accelerator.type "ascend") }}
- {name: ascend-driver, mountPath: /usr/local/Ascend/driver, readOnly: true}
- {name: ascend-dcmi, mountPath: /usr/local/dcmi, readOnly: true}
- {name: npu-smi, mountPath: /usr/local/bin/npu-smi, readOnly: true}
- {name: ascend-install-info, mountPath: /etc/ascend_install.info, readOnly: true}
{{- end }}
{{- end -}}

{{- define "baton.driverVolumes" -}}
{{- if .Values.accelerator.hccnConf | and (eq .Values.accelerator.type "ascend") }}
- {name: hccn-conf, hostPath: {path: {{ .Values.accelerator.hccnConf }}, type: File}}
{{- end }}
{{- if and .Values.accelerator.driverMounts (eq .Values.accelerator.type "ascend") }}
- {name: ascend-driver, hostPath: {path: /usr/local/Ascend/driver, type: Directory}}
- {name: ascend-dcmi, hostPath: {path: /usr/local/dcmi, type: Directory}}
- {name: npu-smi, hostPath: {path: /usr/local/bin/npu-smi, type: File}}
- {name: ascend-install-info, hostPath: {path: /etc/ascend_install.info, type: File}}
{{- end }}
{{- end -}}
